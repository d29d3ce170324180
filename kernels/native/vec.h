// Vectors of the widest kind that the machine computes with, by the compilers' own extension.
#pragma once

#include <cstdint>
#include <limits>

#include "step.h"

namespace blnet {

// How many output channels (kLanes * kVectors) and pixels (kPixels) one call of the innermost
// kernel computes: kVectors * kPixels sums, kVectors weights and one input stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kPixels = 14;  // 28 + 2 + 1 of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2, kPixels = 6;  // 12 + 2 + 1 of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4, kPixels = 6;  // 24 + 4 + 1 of 32
#else
constexpr int kLanes = 4, kVectors = 4, kPixels = 2;  // 8 + 4 + 1 of 16
#endif

constexpr int64_t kGroup = kLanes * kVectors;  // output channels of a full kernel: 16 or 32
constexpr int64_t kGroupBlocks = kGroup / kBlock;
constexpr int kParts = kBlock / kLanes;  // vectors of a block

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec zero() { return Vec{}; }
inline Vec fill(float value) { return value - Vec{}; }  // "+" would turn -0 into 0

// What ReLU leaves of a value, or else all of it: the larger of the value and a bound. A comparison
// with NaN is false, so NaN passes, as it does in PyTorch. A constant 0 would take two instructions.
inline Vec least(bool relu) { return fill(relu ? 0.0f : -std::numeric_limits<float>::infinity()); }
inline Vec at_least(Vec bound, Vec v) { return bound > v ? bound : v; }
inline Vec larger(Vec old, Vec v) { return (v > old) | (v != v) ? v : old; }

}  // namespace blnet
