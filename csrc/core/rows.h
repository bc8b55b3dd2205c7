// Copies between tensors (row after row, of the caller's type) and blocked matrices (of the type that is computed in).
#pragma once
#include "../simd/narrow.h"
#include "shape.h"

namespace ISA {

// One chunk of a row as bfloat16. Two such chunks make one of pairs.
INLINE void narrow(const Blocked<float>& from, long n, long row, const Blocked<Two>& to, long to_row) {
  narrow(FESTINA_BFLOAT16, from.at(n, row), (Half*)to.at(n / 2, to_row) + n % 2 * chunk<float>);
}

// Successive rows of one chunk as pairs, written over the first half of them; an odd last row is paired with zeros.
inline void pair_rows(float* rows, long count) {
  constexpr int C = chunk<float>;
  for (long k = 0; k < count; k += 2) {
    Half halves[2][C] = {};
    for (long i = 0; i < 2 && k + i < count; ++i) narrow(FESTINA_BFLOAT16, rows + (k + i) * C, halves[i]);
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

// A tensor of the caller's: elements of type E, or narrow ones if E is float.
template <class E> struct Tensor {
  void* data;
  long type;
  bool is_narrow;

  Tensor(const void* tensor, long type) : data((void*)tensor), type(type), is_narrow(ISA::is_narrow(type)) {}
  explicit operator bool() const { return data; }
  INLINE E get(long i) const { return is_narrow ? (E)from_narrow(type, ((const Half*)data)[i]) : ((E*)data)[i]; }
  INLINE void put(long i, E x) const {
    if (is_narrow)
      ((Half*)data)[i] = to_narrow(type, (float)x);
    else
      ((E*)data)[i] = x;
  }

  // A whole chunk, from element i on.
  INLINE void get_chunk(long i, E* to) const {
    if constexpr (sizeof(E) == sizeof(float)) {
      if (is_narrow) return widen(type, (const Half*)data + i, to);
    }
    for (int l = 0; l < chunk<E>; l += lanes<E>) store(to + l, load((const E*)data + i + l));
  }
  INLINE void put_chunk(long i, const E* from) const {
    if constexpr (sizeof(E) == sizeof(float)) {
      if (is_narrow) return narrow(type, from, (Half*)data + i);
    }
    for (int l = 0; l < chunk<E>; l += lanes<E>) store((E*)data + i + l, load(from + l));
  }

  template <class Body> INLINE void chunks(long first, long end, long columns, Body body) const {
    for (long n = first; n < end; ++n) body(n, min(chunk<E>, columns - n * chunk<E>));
  }

  // Chunks [first, end) of the row that starts at `start` and has `columns`; columns past the last are zero.
  void read(long start, long columns, long first, long end, const Blocked<E>& to, long row) const {
    chunks(first, end, columns, [&](long n, long count) {
      E* out = to.at(n, row);
      long from = start + n * chunk<E>;
      if (count == chunk<E>) return get_chunk(from, out);
      for (int l = 0; l < chunk<E>; ++l) out[l] = l < count ? get(from + l) : E(0);
    });
  }

  void add(long start, long columns, long first, long end, const Blocked<E>& to, long row) const {
    chunks(first, end, columns, [&](long n, long count) {
      E* out = to.at(n, row);
      long from = start + n * chunk<E>;
      if (count == chunk<E>) {
        alignas(64) E own[chunk<E>];
        get_chunk(from, own);
        for (int l = 0; l < chunk<E>; l += lanes<E>) add_to(out + l, load(own + l));
      } else {
        for (int l = 0; l < count; ++l) out[l] += get(from + l);
      }
    });
  }

  void write(long start, long columns, long first, long end, const Blocked<E>& from, long row, bool is_added = false) const {
    chunks(first, end, columns, [&](long n, long count) {
      const E* in = from.at(n, row);
      long to = start + n * chunk<E>;
      if (count < chunk<E>) {
        for (int l = 0; l < count; ++l) put(to + l, is_added ? get(to + l) + in[l] : in[l]);
      } else if (is_added) {
        alignas(64) E own[chunk<E>];
        get_chunk(to, own);
        for (int l = 0; l < chunk<E>; l += lanes<E>) add_to(own + l, load(in + l));
        put_chunk(to, own);
      } else {
        put_chunk(to, in);
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
