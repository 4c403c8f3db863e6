// IEEE binary16 as a type of its own: conversions round to nearest even and keep subnormals, infinities and NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace gpu {

struct Half {
  uint16_t bits;
};

inline float to_float(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31u;
  uint32_t fraction = h.bits & 0x3FFu, bits = sign;
  if (exponent == 31) {
    bits |= 0x7F800000u | fraction << 13;
  } else if (exponent > 0) {
    bits |= (exponent + 112) << 23 | fraction << 13;
  } else if (fraction > 0) {  // subnormal: fraction * 2^-24, a normal float32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    uint32_t magnitude_bits;
    std::memcpy(&magnitude_bits, &magnitude, 4);
    bits |= magnitude_bits;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline Half to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(0x7FFF)};
  // A magnitude m 2^shift, m an integer: dropping `shift` bits of m rounds to the spacing of halves there.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 102) return {static_cast<uint16_t>(sign)};  // below half of the smallest subnormal
  const bool subnormal = exponent < 113;
  const uint32_t mantissa = subnormal ? (magnitude & 0x7FFFFFu) | 0x800000u : magnitude - (112u << 23);
  const uint32_t shift = subnormal ? 126 - exponent : 13;
  uint32_t half = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
  if (rest > middle || (rest == middle && (half & 1u))) ++half;
  return {static_cast<uint16_t>(sign | (half > 0x7C00u ? 0x7C00u : half))};
}

}  // namespace gpu
