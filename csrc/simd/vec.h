// The abstract vector: VECTOR_BYTES wide, on the compiler's vector extensions (GCC and Clang).
#pragma once
#include <stdint.h>

#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace ISA {

template <class E> struct Raw;
template <> struct Raw<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
  typedef int32_t bits __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Raw<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(VECTOR_BYTES), aligned(8)));
  typedef int64_t bits __attribute__((vector_size(VECTOR_BYTES)));
};

// Two bfloat16 numbers side by side, factors of successive terms of a sum: AVX512_BF16 multiplies and adds both at once.
struct Two {
  uint16_t first, second;
};
template <> struct Raw<Two> {
  typedef int32_t type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t loose __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));  // written half by half
};

// Four weights of 8 bits side by side.
struct Four {
  int8_t value[4];
};
template <> struct Raw<Four> : Raw<Two> {};

template <class E> constexpr int lanes = VECTOR_BYTES / sizeof(E);

// Columns are stored in chunks of one cache line, chunk / lanes vectors each.
template <class E> constexpr int chunk = 64 / sizeof(E);

template <class E> struct Vec {
  using Element = E;
  static constexpr int span = lanes<E>;
  typename Raw<E>::type v;
};

template <class E> INLINE Vec<E> broadcast(E x) { return {x - typename Raw<E>::type{}}; }
template <class E> INLINE Vec<E> load(const E* p) { return {*(const typename Raw<E>::loose*)p}; }
INLINE Vec<Two> broadcast(Two x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return {bits - Raw<Two>::type{}};
}
template <class E> INLINE void store(E* p, Vec<E> x) { *(typename Raw<E>::loose*)p = x.v; }
template <class E> INLINE void add_to(E* p, Vec<E> x) { *(typename Raw<E>::loose*)p += x.v; }

template <class E> INLINE Vec<E> operator+(Vec<E> a, Vec<E> b) { return {a.v + b.v}; }
template <class E> INLINE Vec<E> operator-(Vec<E> a, Vec<E> b) { return {a.v - b.v}; }
template <class E> INLINE Vec<E> operator*(Vec<E> a, Vec<E> b) { return {a.v * b.v}; }
template <class E> INLINE Vec<E> operator/(Vec<E> a, Vec<E> b) { return {a.v / b.v}; }
template <class E> INLINE Vec<E> operator-(Vec<E> a) { return {-a.v}; }
template <class E> INLINE Vec<E> operator+(Vec<E> a, E b) { return a + broadcast(b); }
template <class E> INLINE Vec<E> operator-(Vec<E> a, E b) { return a - broadcast(b); }
template <class E> INLINE Vec<E> operator-(Vec<E> a, int b) { return a - E(b); }
template <class E> INLINE Vec<E> operator*(Vec<E> a, E b) { return a * broadcast(b); }
template <class E> INLINE Vec<E> operator/(Vec<E> a, E b) { return a / broadcast(b); }
template <class E> INLINE Vec<E>& operator+=(Vec<E>& a, Vec<E> b) { return a = a + b; }

// The type in which products of factors of type F are summed; add_product adds one product in each lane.
template <class F> struct SumOf {
  using type = F;
};
template <> struct SumOf<Two> {
  using type = float;
};
template <class F> using Sum = typename SumOf<F>::type;

template <class E> INLINE void add_product(Vec<E>& sum, Vec<E> a, Vec<E> b) { sum += a * b; }
#ifdef HAS_DOT_PRODUCTS
INLINE void add_product(Vec<float>& sum, Vec<Two> a, Vec<Two> b) { sum.v = DOT_PRODUCT(sum.v, a.v, b.v); }
constexpr bool has_dot_products = true;
#else
constexpr bool has_dot_products = false;
#endif

// Rounded weights are kept in words, of two bfloat16 or four integers of 8 bits, which are factors of successive terms of a sum.
// A word may also be a factor itself: then it counts as one term.
template <class F, class W> constexpr int terms = 1;
template <> constexpr int terms<float, Two> = 2;
template <> constexpr int terms<float, Four> = 4;

template <class W> constexpr bool has_scales = false;
template <> constexpr bool has_scales<Four> = true;

// Term j of each word as a factor. Integers come times 2^24: at the upper end of a word the sign is where it has to be.
constexpr float four_unit = 1.0f / (1 << 24);
template <int j, class F> INLINE Vec<F> term(Vec<F> factor, F) { return factor; }
template <int j> INLINE Vec<float> term(Vec<Two> words, float) {
  return {(Raw<float>::type)(j == 0 ? words.v << 16 : words.v & -0x10000)};
}
template <int j> INLINE Vec<float> term(Vec<Four> words, float) {
  return {__builtin_convertvector(j == 0 ? words.v << 24 : words.v << (24 - 8 * j) & -0x1000000, Raw<float>::type)};
}

template <class E> constexpr bool can_pair = has_dot_products && sizeof(E) == sizeof(Two);

// A NaN compares false: it takes the second value.
template <class E> INLINE Vec<E> where_at_most(Vec<E> a, E bound, Vec<E> yes, Vec<E> no) {
  return {a.v <= broadcast(bound).v ? yes.v : no.v};
}
template <class E> INLINE Vec<E> clamp(Vec<E> x, E low, E high) {
  x = where_at_most(x, low, broadcast(low), x);
  return {x.v > broadcast(high).v ? broadcast(high).v : x.v};
}

// Two vectors side by side, whose operations alternate. A cell is a long chain of dependent operations, and a processor looks
// ahead about half of it: the second vector must not wait for the end of the first.
template <class E> struct Twin {
  using Element = E;
  static constexpr int span = 2 * lanes<E>;
  Vec<E> low, high;
};

// The unit in which a chunk is processed: one vector, or a twin.
template <bool is_one, class E> struct SpanOf {
  using type = Twin<E>;
};
template <class E> struct SpanOf<true, E> {
  using type = Vec<E>;
};
template <class E> using Span = typename SpanOf<chunk<E> == lanes<E>, E>::type;

template <class V> INLINE V load_as(const typename V::Element* p) {
  if constexpr (V::span == lanes<typename V::Element>)
    return load(p);
  else
    return {load(p), load(p + V::span / 2)};
}
template <class V> INLINE V broadcast_as(typename V::Element x) {
  if constexpr (V::span == lanes<typename V::Element>)
    return broadcast(x);
  else
    return {broadcast(x), broadcast(x)};
}

template <class E> INLINE void store(E* p, Twin<E> x) { store(p, x.low), store(p + lanes<E>, x.high); }
template <class E> INLINE void add_to(E* p, Twin<E> x) { add_to(p, x.low), add_to(p + lanes<E>, x.high); }

template <class E> INLINE Vec<E> fold(Vec<E> x) { return x; }
template <class E> INLINE Vec<E> fold(Twin<E> x) { return x.low + x.high; }

#define TWINNED(op)                                                                                                  \
  template <class E> INLINE Twin<E> operator op(Twin<E> a, Twin<E> b) { return {a.low op b.low, a.high op b.high}; } \
  template <class E> INLINE Twin<E> operator op(Twin<E> a, E b) { return {a.low op b, a.high op b}; }
TWINNED(+)
TWINNED(-)
TWINNED(*)
TWINNED(/)
#undef TWINNED
template <class E> INLINE Twin<E> operator-(Twin<E> a) { return {-a.low, -a.high}; }
template <class E> INLINE Twin<E> operator-(Twin<E> a, int b) { return a - E(b); }
template <class E> INLINE Twin<E>& operator+=(Twin<E>& a, Twin<E> b) { return a = a + b; }
template <class E> INLINE Twin<E> where_at_most(Twin<E> a, E bound, Twin<E> yes, Twin<E> no) {
  return {where_at_most(a.low, bound, yes.low, no.low), where_at_most(a.high, bound, yes.high, no.high)};
}
template <class E> INLINE Twin<E> clamp(Twin<E> x, E low, E high) {
  return {clamp(x.low, low, high), clamp(x.high, low, high)};
}

// Exchanges blocks of `apart` columns off the diagonal between two rows of a square that lie `apart` rows from each other.
template <int apart, class E, int... lane>
INLINE void exchange(Vec<E>& upper, Vec<E>& lower, std::integer_sequence<int, lane...>) {
  constexpr int n = lanes<E>;
#if defined(__clang__)
  Vec<E> up{__builtin_shufflevector(upper.v, lower.v, (lane & apart ? n + lane - apart : lane)...)};
  Vec<E> low{__builtin_shufflevector(upper.v, lower.v, (lane & apart ? n + lane : lane + apart)...)};
#else
  using Bits = typename Raw<E>::bits;
  Vec<E> up{__builtin_shuffle(upper.v, lower.v, Bits{(lane & apart ? n + lane - apart : lane)...})};
  Vec<E> low{__builtin_shuffle(upper.v, lower.v, Bits{(lane & apart ? n + lane : lane + apart)...})};
#endif
  upper = up, lower = low;
}

// Transposes a square of lanes x lanes numbers: blocks of one, two, four ... columns are exchanged.
template <int apart = 1, class E> INLINE void transpose(Vec<E>* rows) {
  if constexpr (apart < lanes<E>) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes<E>; ++r)
      if (!(r & apart)) exchange<apart>(rows[r], rows[r + apart], std::make_integer_sequence<int, lanes<E>>{});
    transpose<2 * apart>(rows);
  }
}

template <class E> INLINE E sum(Vec<E> x) {
  E total = x.v[0];
  for (int l = 1; l < lanes<E>; ++l) total += x.v[l];
  return total;
}

}  // namespace ISA
