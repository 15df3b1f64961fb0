// Compiles a region of a file for more than the baseline processor. The flags of a Python extension are the
// same for all its files, so the region says it itself.
//
// Open a region only after every include, and keep all of it in an anonymous namespace: a weak inline
// function compiled with wide instructions could otherwise be the copy that the linker keeps for the baseline
// path.
#pragma once

#define CSD_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)  // has no "GCC target"
#define CSD_TARGET_BEGIN(features) \
  CSD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CSD_TARGET_END CSD_PRAGMA(clang attribute pop)
#else
#define CSD_TARGET_BEGIN(features) CSD_PRAGMA(GCC push_options) CSD_PRAGMA(GCC target(features))
#define CSD_TARGET_END CSD_PRAGMA(GCC pop_options)
#endif

// Before a short loop over an array of registers. GCC unrolls such a loop too late to keep the array out of
// memory, and then stores every sum in every round: AVX-512 prefill at 83 instead of 250 GFLOP/s.
#if defined(__clang__)
#define CSD_UNROLL
#else
#define CSD_UNROLL CSD_PRAGMA(GCC unroll 8)
#endif
