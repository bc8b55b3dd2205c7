// Copies between tensors (row after row, of the caller's type) and blocked matrices (of the type that is computed in).
#pragma once
#include "shape.h"

namespace ISA {

INLINE float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float x;
  __builtin_memcpy(&x, &wide, sizeof x);
  return x;
}

INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (uint16_t)((x != x ? bits | 0x400000 : rounded) >> 16);
}

typedef uint16_t __attribute__((may_alias)) Half;  // bfloat16 in memory that holds other types too

// One chunk of a row as bfloat16. Two such chunks make one of pairs.
INLINE void narrow(const float* from, Half* to) {
  for (int l = 0; l < chunk<float>; ++l) to[l] = to_bfloat16(from[l]);
}
INLINE void narrow(const Blocked<float>& from, long n, long row, const Blocked<Two>& to, long to_row) {
  narrow(from.at(n, row), (Half*)to.at(n / 2, to_row) + n % 2 * chunk<float>);
}

// Successive rows of one chunk as pairs, written over the first half of them; an odd last row is paired with zeros.
inline void pair_rows(float* rows, long count) {
  constexpr int C = chunk<float>;
  for (long k = 0; k < count; k += 2) {
    Half halves[2][C] = {};
    for (long i = 0; i < 2 && k + i < count; ++i) narrow(rows + (k + i) * C, halves[i]);
    Half* to = (Half*)(rows + k / 2 * C);
    for (int l = 0; l < C; ++l) to[2 * l] = halves[0][l], to[2 * l + 1] = halves[1][l];
  }
}

// Calls body with the factors of a product: pairs, or plain numbers.
template <class E, class Pairs, class Plain, class Body>
INLINE void with_factor(bool is_paired, Pairs pairs, Plain plain, Body body) {
  if constexpr (can_pair<E>) {
    if (is_paired) return body(pairs);
  }
  body(plain);
}

// A tensor of the caller's: elements of type E, or bfloat16 if E is float.
template <class E> struct Tensor {
  void* data;
  bool is_bfloat16;

  Tensor(const void* tensor, long type) : data((void*)tensor), is_bfloat16(type == FESTINA_BFLOAT16) {}
  explicit operator bool() const { return data; }
  INLINE E get(long i) const { return is_bfloat16 ? (E)from_bfloat16(((uint16_t*)data)[i]) : ((E*)data)[i]; }
  INLINE void put(long i, E x) const {
    if (is_bfloat16)
      ((uint16_t*)data)[i] = to_bfloat16((float)x);
    else
      ((E*)data)[i] = x;
  }

  template <class Body> INLINE void chunks(long first, long end, long columns, Body body) const {
    for (long n = first; n < end; ++n) body(n, min(chunk<E>, columns - n * chunk<E>));
  }

  // Chunks [first, end) of the row that starts at `start` and has `columns`; columns past the last are zero.
  void read(long start, long columns, long first, long end, const Blocked<E>& to, long row) const {
    chunks(first, end, columns, [&](long n, long count) {
      E* out = to.at(n, row);
      long from = start + n * chunk<E>;
      if (!is_bfloat16 && count == chunk<E>) {
        for (int l = 0; l < chunk<E>; l += lanes<E>) store(out + l, load((const E*)data + from + l));
      } else {
        for (int l = 0; l < chunk<E>; ++l) out[l] = l < count ? get(from + l) : E(0);
      }
    });
  }

  void add(long start, long columns, long first, long end, const Blocked<E>& to, long row) const {
    chunks(first, end, columns, [&](long n, long count) {
      E* out = to.at(n, row);
      long from = start + n * chunk<E>;
      if (!is_bfloat16 && count == chunk<E>) {
        for (int l = 0; l < chunk<E>; l += lanes<E>) add_to(out + l, load((const E*)data + from + l));
      } else {
        for (int l = 0; l < count; ++l) out[l] += get(from + l);
      }
    });
  }

  void write(long start, long columns, long first, long end, const Blocked<E>& from, long row, bool is_added = false) const {
    chunks(first, end, columns, [&](long n, long count) {
      const E* in = from.at(n, row);
      long to = start + n * chunk<E>;
      if (!is_bfloat16 && count == chunk<E>) {
        E* out = (E*)data + to;
        for (int l = 0; l < chunk<E>; l += lanes<E>) store(out + l, is_added ? load(out + l) + load(in + l) : load(in + l));
      } else {
        for (int l = 0; l < count; ++l) put(to + l, is_added ? get(to + l) + in[l] : in[l]);
      }
    });
  }
};

template <class E> void clear_row(const Blocked<E>& m, long first, long end, long row) {
  for (long n = first; n < end; ++n)
    for (int l = 0; l < chunk<E>; ++l) m.at(n, row)[l] = 0;
}

template <class E> void copy_row(const Blocked<E>& from, long from_row, const Blocked<E>& to, long row, long first, long end) {
  for (long n = first; n < end; ++n)
    for (int l = 0; l < chunk<E>; l += lanes<E>) store(to.at(n, row) + l, load(from.at(n, from_row) + l));
}

}  // namespace ISA
