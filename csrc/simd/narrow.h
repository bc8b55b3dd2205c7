// bfloat16 and float16: 16 bits in memory, float in arithmetic. Rounding is to the nearest, ties to even.
#pragma once
#include "../festina.h"
#include "vec.h"
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ISA {

typedef uint16_t __attribute__((may_alias)) Half;  // in memory that holds other types too

INLINE bool is_narrow(long type) { return type == FESTINA_BFLOAT16 || type == FESTINA_FLOAT16; }

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float from_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits = bits_of(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (uint16_t)((x != x ? bits | 0x400000 : rounded) >> 16);
}

// float16's exponent and mantissa stand 13 bits further down than float's, and its exponents count from 112 more.
constexpr int float16_shift = 13;
constexpr uint32_t float16_bias = 112u << 23, float_infinity = 0x7f800000;

// Without branches, so that loops over it become vectors.
INLINE float from_float16(uint16_t bits) {
  uint32_t size = bits & 0x7fff, sign = (uint32_t)(bits & 0x8000) << 16;
  uint32_t normal = (size << float16_shift) + float16_bias + (size >= 0x7c00 ? float16_bias : 0);  // inf and NaN, too
  uint32_t subnormal = bits_of((float)(int32_t)size * 0x1p-24f);
  return float_of((size < 0x400 ? subnormal : normal) | sign);
}

INLINE uint16_t to_float16(float x) {
  uint32_t bits = bits_of(x), size = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  uint32_t normal = (size - float16_bias + 0xfff + (size >> float16_shift & 1)) >> float16_shift;
  uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);  // a float near 0.5 ends where a subnormal float16 does
  uint32_t finite = size < float16_bias + (1u << 23) ? subnormal : normal;
  uint32_t any = size >= bits_of(65520.0f) ? 0x7c00 : finite;  // halfway from the largest number to 65536
  return (uint16_t)((size > float_infinity ? 0x7e00 : any) | sign);
}

INLINE float from_narrow(long type, uint16_t bits) {
  return type == FESTINA_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}
INLINE uint16_t to_narrow(long type, float x) { return type == FESTINA_BFLOAT16 ? to_bfloat16(x) : to_float16(x); }

// One chunk.
INLINE void widen(long type, const Half* from, float* to) {
  constexpr int C = chunk<float>;
  if (type == FESTINA_BFLOAT16) {
    for (int l = 0; l < C; ++l) to[l] = from_bfloat16(from[l]);
    return;
  }
#if defined(__F16C__)
  for (int l = 0; l < C; l += 8) _mm256_storeu_ps(to + l, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u*)(from + l))));
#elif defined(__aarch64__)
  for (int l = 0; l < C; l += 4) vst1q_f32(to + l, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from + l))));
#else
  for (int l = 0; l < C; ++l) to[l] = from_float16(from[l]);
#endif
}

INLINE void narrow(long type, const float* from, Half* to) {
  constexpr int C = chunk<float>;
  if (type == FESTINA_BFLOAT16) {
    for (int l = 0; l < C; ++l) to[l] = to_bfloat16(from[l]);
    return;
  }
#if defined(__F16C__)
  for (int l = 0; l < C; l += 8)
    _mm_storeu_si128((__m128i_u*)(to + l), _mm256_cvtps_ph(_mm256_loadu_ps(from + l), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  for (int l = 0; l < C; l += 4) vst1_u16((uint16_t*)to + l, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + l))));
#else
  for (int l = 0; l < C; ++l) to[l] = to_float16(from[l]);
#endif
}

}  // namespace ISA
