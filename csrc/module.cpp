// `import torch_csd._C` loads this library, and with it the ops of ops.cpp. The module itself is empty.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000  // 3.10; torch's build sets the same
#endif
#include "module.h"

#include <Python.h>

namespace csd {

void warn_in_python(const std::string& text) {
  if (Py_IsInitialized() == 0) return;
  const PyGILState_STATE state = PyGILState_Ensure();
  // Level 1 is torch's wrapper of the op, 2 is torch_csd/ops.py.
  if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 2) != 0) PyErr_WriteUnraisable(nullptr);
  PyGILState_Release(state);
}

}  // namespace csd

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
