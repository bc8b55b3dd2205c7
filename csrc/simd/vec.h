// The abstract vector: VECTOR_BYTES wide, on the compiler's vector extensions (GCC and Clang).
#pragma once
#include <stdint.h>

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

template <class T> constexpr int lanes = VECTOR_BYTES / sizeof(T);

// Columns lie in chunks of one cache line, whatever the vector: chunk / lanes vectors make one.
template <class T> constexpr int chunk = 64 / sizeof(T);

template <class T> struct Vec {
  typename Raw<T>::type v;
};

template <class T> INLINE Vec<T> broadcast(T x) { return {x - typename Raw<T>::type{}}; }
template <class T> INLINE Vec<T> load(const T* p) { return {*(const typename Raw<T>::loose*)p}; }
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
template <class T> INLINE Vec<T> operator-(T a, Vec<T> b) { return broadcast(a) - b; }
template <class T> INLINE Vec<T> operator*(Vec<T> a, T b) { return a * broadcast(b); }
template <class T> INLINE Vec<T>& operator+=(Vec<T>& a, Vec<T> b) { return a = a + b; }

// A NaN compares false: it takes the second value.
template <class T> INLINE Vec<T> where_less(Vec<T> a, T bound, Vec<T> yes, Vec<T> no) {
  return {a.v < broadcast(bound).v ? yes.v : no.v};
}
template <class T> INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  x = where_less(x, low, broadcast(low), x);
  return {x.v > broadcast(high).v ? broadcast(high).v : x.v};
}

template <class T> INLINE T sum(Vec<T> x) {
  T total = x.v[0];
  for (int l = 1; l < lanes<T>; ++l) total += x.v[l];
  return total;
}

}  // namespace ISA
