// The abstract vector: VECTOR_BYTES wide, on the compiler's vector extensions (GCC and Clang).
#pragma once
#include <stdint.h>

#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace ISA {

template <class T> struct Raw;
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

// Two bfloat16 numbers side by side, successive ones of a sum: what AVX512_BF16 multiplies and adds in one instruction.
struct Two {
  uint16_t first, second;
};
template <> struct Raw<Two> {
  typedef int32_t type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t loose __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));  // written half by half
};

template <class T> constexpr int lanes = VECTOR_BYTES / sizeof(T);

// Columns lie in chunks of one cache line, whatever the vector: chunk / lanes vectors make one.
template <class T> constexpr int chunk = 64 / sizeof(T);

template <class T> struct Vec {
  using Element = T;
  static constexpr int span = lanes<T>;
  typename Raw<T>::type v;
};

template <class T> INLINE Vec<T> broadcast(T x) { return {x - typename Raw<T>::type{}}; }
template <class T> INLINE Vec<T> load(const T* p) { return {*(const typename Raw<T>::loose*)p}; }
INLINE Vec<Two> broadcast(Two x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return {bits - Raw<Two>::type{}};
}
template <class T> INLINE void store(T* p, Vec<T> x) { *(typename Raw<T>::loose*)p = x.v; }
template <class T> INLINE void add_to(T* p, Vec<T> x) { *(typename Raw<T>::loose*)p += x.v; }

template <class T> INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) { return {a.v + b.v}; }
template <class T> INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) { return {a.v - b.v}; }
template <class T> INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) { return {a.v * b.v}; }
template <class T> INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) { return {a.v / b.v}; }
template <class T> INLINE Vec<T> operator-(Vec<T> a) { return {-a.v}; }
template <class T> INLINE Vec<T> operator+(Vec<T> a, T b) { return a + broadcast(b); }
template <class T> INLINE Vec<T> operator-(Vec<T> a, T b) { return a - broadcast(b); }
template <class T> INLINE Vec<T> operator-(Vec<T> a, int b) { return a - T(b); }
template <class T> INLINE Vec<T> operator*(Vec<T> a, T b) { return a * broadcast(b); }
template <class T> INLINE Vec<T> operator/(Vec<T> a, T b) { return a / broadcast(b); }
template <class T> INLINE Vec<T>& operator+=(Vec<T>& a, Vec<T> b) { return a = a + b; }

// What products of numbers of type E are summed in, and the sum with one more product in each lane.
template <class E> struct SumOf { using type = E; };
template <> struct SumOf<Two> { using type = float; };
template <class E> using Sum = typename SumOf<E>::type;

template <class T> INLINE void add_product(Vec<T>& sum, Vec<T> a, Vec<T> b) { sum += a * b; }
#ifdef HAS_DOT_PRODUCTS
INLINE void add_product(Vec<float>& sum, Vec<Two> a, Vec<Two> b) { sum.v = DOT_PRODUCT(sum.v, a.v, b.v); }
constexpr bool has_dot_products = true;
#else
constexpr bool has_dot_products = false;
#endif

template <class T> constexpr bool can_pair = has_dot_products && sizeof(T) == sizeof(Two);

// A NaN compares false: it takes the second value.
template <class T> INLINE Vec<T> where_at_most(Vec<T> a, T bound, Vec<T> yes, Vec<T> no) {
  return {a.v <= broadcast(bound).v ? yes.v : no.v};
}
template <class T> INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  x = where_at_most(x, low, broadcast(low), x);
  return {x.v > broadcast(high).v ? broadcast(high).v : x.v};
}

// Two vectors side by side, whose operations take turns. A cell is a long chain of operations, each of which needs the
// one before: half of it is as much as a processor looks ahead, so that the second vector must not come after the first.
template <class T> struct Twin {
  using Element = T;
  static constexpr int span = 2 * lanes<T>;
  Vec<T> low, high;
};

// How a chunk is gone through: in one vector, or in twins.
template <bool is_one, class T> struct SpanOf { using type = Twin<T>; };
template <class T> struct SpanOf<true, T> { using type = Vec<T>; };
template <class T> using Span = typename SpanOf<chunk<T> == lanes<T>, T>::type;

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

template <class T> INLINE void store(T* p, Twin<T> x) { store(p, x.low), store(p + lanes<T>, x.high); }
template <class T> INLINE void add_to(T* p, Twin<T> x) { add_to(p, x.low), add_to(p + lanes<T>, x.high); }

template <class T> INLINE Vec<T> fold(Vec<T> x) { return x; }
template <class T> INLINE Vec<T> fold(Twin<T> x) { return x.low + x.high; }

#define TWINNED(op)                                                                                              \
  template <class T> INLINE Twin<T> operator op(Twin<T> a, Twin<T> b) { return {a.low op b.low, a.high op b.high}; } \
  template <class T> INLINE Twin<T> operator op(Twin<T> a, T b) { return {a.low op b, a.high op b}; }
TWINNED(+)
TWINNED(-)
TWINNED(*)
TWINNED(/)
#undef TWINNED
template <class T> INLINE Twin<T> operator-(Twin<T> a) { return {-a.low, -a.high}; }
template <class T> INLINE Twin<T> operator-(Twin<T> a, int b) { return a - T(b); }
template <class T> INLINE Twin<T>& operator+=(Twin<T>& a, Twin<T> b) { return a = a + b; }
template <class T> INLINE Twin<T> where_at_most(Twin<T> a, T bound, Twin<T> yes, Twin<T> no) {
  return {where_at_most(a.low, bound, yes.low, no.low), where_at_most(a.high, bound, yes.high, no.high)};
}
template <class T> INLINE Twin<T> clamp(Twin<T> x, T low, T high) { return {clamp(x.low, low, high), clamp(x.high, low, high)}; }

// Two rows of a square, `apart` from one another, after the blocks of so many columns off the diagonal have changed places.
template <int apart, class T, int... lane>
INLINE void exchange(Vec<T>& upper, Vec<T>& lower, std::integer_sequence<int, lane...>) {
  constexpr int n = lanes<T>;
#if defined(__clang__)
  Vec<T> up{__builtin_shufflevector(upper.v, lower.v, (lane & apart ? n + lane - apart : lane)...)};
  Vec<T> low{__builtin_shufflevector(upper.v, lower.v, (lane & apart ? n + lane : lane + apart)...)};
#else
  using Bits = typename Raw<T>::bits;
  Vec<T> up{__builtin_shuffle(upper.v, lower.v, Bits{(lane & apart ? n + lane - apart : lane)...})};
  Vec<T> low{__builtin_shuffle(upper.v, lower.v, Bits{(lane & apart ? n + lane : lane + apart)...})};
#endif
  upper = up, lower = low;
}

// Turns a square of rows into its columns: blocks of one, two, four ... columns change places.
template <int apart = 1, class T> INLINE void transpose(Vec<T>* rows) {
  if constexpr (apart < lanes<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes<T>; ++r)
      if (!(r & apart)) exchange<apart>(rows[r], rows[r + apart], std::make_integer_sequence<int, lanes<T>>{});
    transpose<2 * apart>(rows);
  }
}

template <class T> INLINE T sum(Vec<T> x) {
  T total = x.v[0];
  for (int l = 1; l < lanes<T>; ++l) total += x.v[l];
  return total;
}

}  // namespace ISA
