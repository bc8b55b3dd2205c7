// Sigmoid and tanh: one exponential polynomial and one division each.
#pragma once
#include "../simd/vec.h"

namespace ISA {

template <class E> struct Exp;
template <> struct Exp<float> {
  // ln 2 in two parts; the first has so few bits that its product with any exponent is exact.
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.0f, limit = 87.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int32_t one = 0x3f800000;
  static constexpr int mantissa = 23;
  // Minimax for (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2: relative error of e^r - 1 is 1.3e-8.
  static constexpr float series[] = {0.499999984f, 0.166665429f, 0.0416672006f, 0.00836658022f, 0.0013882545f};
};
template <> struct Exp<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0, limit = 708.0;
  static constexpr int64_t one = 0x3ff0000000000000;
  static constexpr int mantissa = 52;
  static constexpr double series[] = {1. / 2,     1. / 6,      1. / 24,      1. / 120,      1. / 720,       1. / 5040,
                                      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

// 2^n, for n = rounded - Exp::round.
template <class E> INLINE Vec<E> power_of_two(Vec<E> rounded) {
  using Bits = typename Raw<E>::bits;
  return {(typename Raw<E>::type)(((Bits)rounded.v << Exp<E>::mantissa) + Exp<E>::one)};
}
template <class E> INLINE Twin<E> power_of_two(Twin<E> rounded) {
  return {power_of_two(rounded.low), power_of_two(rounded.high)};
}

// e^x = scale + scale * rest, with rest = e^r - 1 for the part r of x that is within ln 2 / 2 of zero.
template <class V> INLINE void exp_parts(V x, V& scale, V& rest) {
  using E = typename V::Element;
  using Constants = Exp<E>;
  V rounded = x * Constants::log2e + Constants::round;
  V n = rounded - Constants::round;
  V r = (x - n * Constants::ln2_high) - n * Constants::ln2_low;
  constexpr int terms = sizeof(Constants::series) / sizeof(E);
  V q = broadcast_as<V>(Constants::series[terms - 1]);
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 0; --k) q = q * r + Constants::series[k];
  scale = power_of_two(rounded);
  rest = r * r * q + r;
}

template <class V> INLINE V sigmoid(V x) {
  using E = typename V::Element;
  V scale, rest;
  exp_parts(clamp(-x, -Exp<E>::limit, Exp<E>::limit), scale, rest);
  return broadcast_as<V>(E(1)) / (scale * rest + scale + E(1));
}

// (e^2x - 1) / (e^2x + 1), with e^2x - 1 made without cancellation near zero.
template <class V> INLINE V tanh(V x) {
  using E = typename V::Element;
  V scale, rest;
  exp_parts(clamp(x + x, E(-40), E(40)), scale, rest);
  V e = scale * rest + (scale - E(1));
  return e / (e + E(2));
}

}  // namespace ISA
