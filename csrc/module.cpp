// `import torch_csd._C` loads this library, and with it the ops of ops.cpp. The module itself is empty.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000  // 3.10; torch's build sets the same
#endif
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
