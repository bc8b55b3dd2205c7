// Between tensors (row after row, of the caller's type) and blocked matrices (of the type that is computed in).
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
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A tensor of the caller's: elements of T, or bfloat16 where T is float.
template <class T> struct Tensor {
  void* data;
  bool is_bfloat16;

  Tensor(const void* tensor, long type) : data((void*)tensor), is_bfloat16(type == FESTINA_BFLOAT16) {}
  explicit operator bool() const { return data; }
  INLINE T get(long i) const { return is_bfloat16 ? (T)from_bfloat16(((uint16_t*)data)[i]) : ((T*)data)[i]; }
  INLINE void put(long i, T x) const {
    if (is_bfloat16)
      ((uint16_t*)data)[i] = to_bfloat16((float)x);
    else
      ((T*)data)[i] = x;
  }

  template <class Body> INLINE void chunks(long first, long end, long columns, Body body) const {
    for (long n = first; n < end; ++n) body(n, min(chunk<T>, columns - n * chunk<T>));
  }

  // Chunks [first, end) of the row that starts at `start` and has `columns`; columns past the last are zero.
  void read(long start, long columns, long first, long end, const Blocked<T>& to, long row) const {
    chunks(first, end, columns, [&](long n, long width) {
      T* out = to.at(n, row);
      long from = start + n * chunk<T>;
      if (!is_bfloat16 && width == chunk<T>) {
        for (int l = 0; l < chunk<T>; l += lanes<T>) store(out + l, load((const T*)data + from + l));
      } else {
        for (int l = 0; l < chunk<T>; ++l) out[l] = l < width ? get(from + l) : T(0);
      }
    });
  }

  void add(long start, long columns, long first, long end, const Blocked<T>& to, long row) const {
    chunks(first, end, columns, [&](long n, long width) {
      T* out = to.at(n, row);
      long from = start + n * chunk<T>;
      if (!is_bfloat16 && width == chunk<T>) {
        for (int l = 0; l < chunk<T>; l += lanes<T>) add_to(out + l, load((const T*)data + from + l));
      } else {
        for (int l = 0; l < width; ++l) out[l] += get(from + l);
      }
    });
  }

  void write(long start, long columns, long first, long end, const Blocked<T>& from, long row, bool is_added = false) const {
    chunks(first, end, columns, [&](long n, long width) {
      const T* in = from.at(n, row);
      long to = start + n * chunk<T>;
      if (!is_bfloat16 && width == chunk<T>) {
        T* out = (T*)data + to;
        for (int l = 0; l < chunk<T>; l += lanes<T>) store(out + l, is_added ? load(out + l) + load(in + l) : load(in + l));
      } else {
        for (int l = 0; l < width; ++l) put(to + l, is_added ? get(to + l) + in[l] : in[l]);
      }
    });
  }
};

template <class T> void clear_row(const Blocked<T>& m, long first, long end, long row) {
  for (long n = first; n < end; ++n)
    for (int l = 0; l < chunk<T>; ++l) m.at(n, row)[l] = 0;
}

template <class T> void copy_row(const Blocked<T>& from, long from_row, const Blocked<T>& to, long row, long first, long end) {
  for (long n = first; n < end; ++n)
    for (int l = 0; l < chunk<T>; l += lanes<T>) store(to.at(n, row) + l, load(from.at(n, from_row) + l));
}

}  // namespace ISA
