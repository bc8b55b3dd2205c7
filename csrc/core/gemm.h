// Products. One micro-kernel keeps a tile of rows x chunks in registers; every product of the library goes through it.
#pragma once
#include "shape.h"

namespace ISA {

constexpr long depth_block = 256;  // longer sums in one accumulator lose digits, shorter ones time

// Element (row, k) of the left operand lies at data + row_at[row] + (k / chunk) * step + (k % chunk) * stride, where the
// stride is 1, or chunk<T> where k runs over the rows of a blocked matrix.
template <class T> struct Left {
  const T* data;
  const long* row_at;
  long step;
};

// Chunk n of row k: data + n * step + k * chunk<T>.
template <class T> struct Panels {
  const T* data;
  long step;
};

// Chunk n of a row: data + row_at[row] + n * step.
template <class T> struct Target {
  T* data;
  const long* row_at;
  long step;
};

// Where the squares of a result go: those of column chunk n to data + (n % period) * step + row * lanes.
template <class T> struct Squares {
  T* data;
  long step, period, n, row;
  INLINE T* at(long chunk, long r) const { return data + (n + chunk) % period * step + (row + r) * lanes<T>; }
};

// Factors are of type E, results of type Sum<E>: where E is `Two`, every k below counts two terms of a sum.
template <class E, int rows, int chunks, int stride>
void tile(Left<E> a, Panels<E> b, long depth, Target<Sum<E>> c, bool is_added, Squares<Sum<E>> squares) {
  using T = Sum<E>;
  constexpr int parts = chunk<T> / lanes<T>, wide = chunks * parts, block = chunk<T>;
  Vec<T> sums[rows][wide];
  const E* left[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    left[r] = a.data + a.row_at[r];
#pragma GCC unroll 4
    for (int i = 0; i < chunks; ++i) __builtin_prefetch(c.data + c.row_at[r] + i * c.step, 1);  // the sum takes its time
#pragma GCC unroll 16
    for (int n = 0; n < wide; ++n) sums[r][n] = broadcast(T(0));
  }
  const E* right = b.data;
  auto multiply = [&](int k) __attribute__((always_inline)) {
    auto column = [&](int n) __attribute__((always_inline)) {
      return load(right + n / parts * b.step + n % parts * lanes<T> + k * block);
    };
    // The factor with fewer vectors waits in registers: else those of a low, wide tile would not suffice.
    if constexpr (rows < wide) {
      Vec<E> x[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) x[r] = broadcast(left[r][k * stride]);
#pragma GCC unroll 16
      for (int n = 0; n < wide; ++n) {
        Vec<E> y = column(n);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) add_product(sums[r][n], x[r], y);
      }
    } else {
      Vec<E> y[wide];
#pragma GCC unroll 16
      for (int n = 0; n < wide; ++n) y[n] = column(n);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        Vec<E> x = broadcast(left[r][k * stride]);
#pragma GCC unroll 16
        for (int n = 0; n < wide; ++n) add_product(sums[r][n], x, y[n]);
      }
    }
  };
  for (; depth >= block; depth -= block) {
#pragma GCC unroll 4
    for (int k = 0; k < block; ++k) multiply(k);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) left[r] += a.step;
    right += block * block;
  }
  for (int k = 0; k < depth; ++k) multiply(k);

#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < chunks; ++i) {
      T* to = c.data + c.row_at[r] + i * c.step;
      Vec<T> square = broadcast(T(0));
#pragma GCC unroll 4
      for (int n = 0; n < parts; ++n) {
        Vec<T>& x = sums[r][i * parts + n];
        if (is_added) x += load(to + n * lanes<T>);
        store(to + n * lanes<T>, x);
        square += x * x;
      }
      if (squares.data) add_to(squares.at(i, r), square);
    }
}

// The widest tile of so many rows that the registers hold.
template <class T> constexpr int chunks_for(int rows) {
  int fit = ACCUMULATORS / (rows * (chunk<T> / lanes<T>));
  return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

template <class E, int rows, int stride, int chunks = chunks_for<E>(rows)>
INLINE void tile_of(long wanted, Left<E> a, Panels<E> b, long depth, Target<Sum<E>> c, bool is_added, Squares<Sum<E>> squares) {
  if constexpr (chunks > 1) {
    if (wanted < chunks) return tile_of<E, rows, stride, chunks - 1>(wanted, a, b, depth, c, is_added, squares);
  }
  tile<E, rows, chunks, stride>(a, b, depth, c, is_added, squares);
}

template <class E, int stride, int rows = TILE_ROWS>
INLINE void tile_rows(long count, long chunks, Left<E> a, Panels<E> b, long depth, Target<Sum<E>> c, bool is_added,
                      Squares<Sum<E>> squares) {
  if constexpr (rows > 1) {
    if (count < rows) return tile_rows<E, stride, rows - 1>(count, chunks, a, b, depth, c, is_added, squares);
  }
  tile_of<E, rows, stride>(chunks, a, b, depth, c, is_added, squares);
}

// Rows are cut evenly into tiles: 8 rows are 4 + 4, as 6 + 2 would leave the second tile waiting.
template <class T> struct Tiling {
  long down, wide;
  INLINE explicit Tiling(long rows) : down(ceil_div(rows, TILE_ROWS)), wide(chunks_for<T>(ceil_div(rows, down))) {}
  INLINE long count(long chunks, long depth) const { return down * ceil_div(chunks, wide) * ceil_div(depth, depth_block); }
};

struct Nothing {
  INLINE void operator()() const {}
};

// c = or += a b for `rows` rows and `chunks` chunks of columns. Where there are `squares`, those of the result are
// added to them. `beside` is called once a tile: a place for memory that is needed later to be fetched.
template <class E, int stride = 1, class Beside = Nothing>
void multiply(Left<E> a, long rows, Panels<E> b, long chunks, long depth, Target<Sum<E>> c, bool is_added,
              Squares<Sum<E>> squares = {}, Beside beside = {}) {
  if (rows == 0) return;
  constexpr long left_bytes = 192 << 10;  // what of the left operand is gone through for every panel: it stays in L2
  Tiling<E> tiling(rows);
  long tiles = tiling.down, wide = tiling.wide;
  // The panels of chunk n from k on, fetched into L2 by shares, one beside each tile that those before them are multiplied
  // by. It pays where the panels come from beyond L2 and tiles are many; else the processor's own prefetching does better.
  constexpr long least_tiles = 6, least_bytes = 28 << 20;
  bool is_fetched = tiles >= least_tiles && tiles * chunks * depth * chunk<E> * (long)sizeof(E) >= least_bytes;
  auto fetch = [&](long n, long k, long i) __attribute__((always_inline)) {  // GCC drops calls that do nothing but prefetch
    long lines = min(depth_block, depth - k);
    for (long chunk_end = min(n + wide, chunks); n < chunk_end; ++n) {
      const E *panel = b.data + n * b.step + k * chunk<E>, *end = panel + lines * (i + 1) / tiles * chunk<E>;
#pragma GCC unroll 4
      for (const E* line = panel + lines * i / tiles * chunk<E>; line < end; line += chunk<E>) __builtin_prefetch(line, 0, 2);
    }
  };
  long reach = max(1, left_bytes / (rows * (long)sizeof(E) * depth_block)) * depth_block;
  for (long far = 0; far == 0 || far < depth; far += reach)
    for (long n = 0; n < chunks; n += wide)
      for (long k = far, end = min(depth, far + reach); k == far || k < end; k += depth_block) {
        bool is_last = k + depth_block >= depth;
        bool is_deeper = k + depth_block < end;
        Panels<E> right{b.data + n * b.step + k * chunk<E>, b.step};
        for (long i = 0, row = 0; i < tiles; ++i) {
          long next = rows * (i + 1) / tiles;
          Left<E> left{a.data + k / chunk<E> * a.step, a.row_at + row, a.step};
          Target<Sum<E>> to{c.data + n * c.step, c.row_at + row, c.step};
          tile_rows<E, stride>(next - row, min(wide, chunks - n), left, right, min(depth_block, depth - k), to,
                               is_added || k > 0, {is_last ? squares.data : nullptr, squares.step, squares.period, n, row});
          if (is_fetched) is_deeper ? fetch(n, k + depth_block, i) : fetch(n + wide, far, i);
          beside();
          row = next;
        }
      }
}

}  // namespace ISA
