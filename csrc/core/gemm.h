// Products. One micro-kernel keeps a tile of rows x chunks in registers; every product of the library goes through it.
#pragma once
#include "shape.h"

namespace ISA {

constexpr long depth_block = 256;  // longer sums in one accumulator lose digits, shorter ones time

// In all operands, row_at[row] is the offset of a row, and `stride` the distance from one chunk to the next.

// Element (row, k) of the left operand: data + row_at[row] + (k / chunk) * stride + (k % chunk) * k_stride. k_stride is 1, or
// chunk<F> if k runs over the rows of a blocked matrix.
template <class F> struct Left {
  const F* data;
  const long* row_at;
  long stride;
};

// The right operand, in panels: chunk n of row k at data + n * stride + k * chunk<W>. Panels of `Four` have a row more in front
// of the first, the factors of their columns; `tile` finds them at scales + n * stride.
template <class W> struct Right {
  const W* data;
  long stride;
  const float* scales = nullptr;
};

// Chunk n of a row: data + row_at[row] + n * stride.
template <class E> struct Target {
  E* data;
  const long* row_at;
  long stride;
};

// Where the squares of a result are added: those of column chunk n to data + (n % period) * stride + row * lanes.
template <class E> struct Squares {
  E* data;
  long stride, period, n, row;
  INLINE E* at(long chunk, long r) const { return data + (n + chunk) % period * stride + (row + r) * lanes<E>; }
};

// Adds term j of a row of words to each sum, times that of the left operand.
template <class F, int j, int vectors, int rows, int wide, class W>
INLINE void add_term(Vec<Sum<F>> (&sums)[rows][wide], F const* const (&left)[rows], long k, const W* words, long stride) {
  auto column = [&](int n) __attribute__((always_inline)) {
    return term<j>(load(words + n / vectors * stride + n % vectors * lanes<W>), F{});
  };
  // The factor with fewer vectors waits in registers: else those of a low, wide tile would not suffice.
  if constexpr (rows < wide) {
    Vec<F> x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) x[r] = broadcast(left[r][k]);
#pragma GCC unroll 16
    for (int n = 0; n < wide; ++n) {
      Vec<F> y = column(n);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) add_product(sums[r][n], x[r], y);
    }
  } else {
    Vec<F> y[wide];
#pragma GCC unroll 16
    for (int n = 0; n < wide; ++n) y[n] = column(n);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      Vec<F> x = broadcast(left[r][k]);
#pragma GCC unroll 16
      for (int n = 0; n < wide; ++n) add_product(sums[r][n], x, y[n]);
    }
  }
}

// Factors are of type F, results of type Sum<F>; the right ones lie in memory as words W of one or several terms. If F is `Two`,
// each k below stands for two terms of a sum.
template <class F, class W, int rows, int chunks, int k_stride>
void tile(Left<F> a, Right<W> b, long depth, Target<Sum<F>> c, bool is_added, Squares<Sum<F>> squares) {
  using E = Sum<F>;
  constexpr int vectors = chunk<E> / lanes<E>, wide = chunks * vectors, block = chunk<E>, terms = ISA::terms<F, W>;
  Vec<E> sums[rows][wide];
  const F* left[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    left[r] = a.data + a.row_at[r];
#pragma GCC unroll 4
    for (int i = 0; i < chunks; ++i) __builtin_prefetch(c.data + c.row_at[r] + i * c.stride, 1);  // the sum takes its time
#pragma GCC unroll 16
    for (int n = 0; n < wide; ++n) sums[r][n] = broadcast(E(0));
  }
  const W* right = b.data;
  // The first `count` terms of a row of words.
  auto multiply = [&](int word, long count) __attribute__((always_inline)) {
    const W* words = right + word * block;
    int k = word * terms;
    add_term<F, 0, vectors>(sums, left, k * k_stride, words, b.stride);
    if constexpr (terms > 1) {
      if (count > 1) add_term<F, 1, vectors>(sums, left, (k + 1) * k_stride, words, b.stride);
    }
    if constexpr (terms > 2) {
      if (count > 2) add_term<F, 2, vectors>(sums, left, (k + 2) * k_stride, words, b.stride);
      if (count > 3) add_term<F, 3, vectors>(sums, left, (k + 3) * k_stride, words, b.stride);
    }
  };
  for (; depth >= block; depth -= block) {
#pragma GCC unroll 4
    for (int word = 0; word < block / terms; ++word) multiply(word, terms);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) left[r] += a.stride;
    right += block / terms * block;
  }
  for (int word = 0; word * terms < depth; ++word) multiply(word, depth - word * terms);

#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < chunks; ++i) {
      E* to = c.data + c.row_at[r] + i * c.stride;
      Vec<E> square = broadcast(E(0));
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) {
        Vec<E>& x = sums[r][i * vectors + n];
        if constexpr (has_scales<W>) x = x * load(b.scales + i * b.stride + n * lanes<E>);
        if (is_added) x += load(to + n * lanes<E>);
        store(to + n * lanes<E>, x);
        square += x * x;
      }
      if (squares.data) add_to(squares.at(i, r), square);
    }
}

// Chunks in the widest tile of `rows` rows that fits in the registers.
template <class F> constexpr int chunks_for(int rows) {
  int fit = ACCUMULATORS / (rows * (chunk<F> / lanes<F>));
  return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

template <class F, class W, int rows, int k_stride, int chunks = chunks_for<F>(rows)>
INLINE void tile_of(long wanted, Left<F> a, Right<W> b, long depth, Target<Sum<F>> c, bool is_added, Squares<Sum<F>> squares) {
  if constexpr (chunks > 1) {
    if (wanted < chunks) return tile_of<F, W, rows, k_stride, chunks - 1>(wanted, a, b, depth, c, is_added, squares);
  }
  tile<F, W, rows, chunks, k_stride>(a, b, depth, c, is_added, squares);
}

template <class F, class W, int k_stride, int rows = TILE_ROWS>
INLINE void tile_rows(long count, long chunks, Left<F> a, Right<W> b, long depth, Target<Sum<F>> c, bool is_added,
                      Squares<Sum<F>> squares) {
  if constexpr (rows > 1) {
    if (count < rows) return tile_rows<F, W, k_stride, rows - 1>(count, chunks, a, b, depth, c, is_added, squares);
  }
  tile_of<F, W, rows, k_stride>(chunks, a, b, depth, c, is_added, squares);
}

// Rows are cut evenly into tiles: 8 rows are 4 + 4, since a tile of 2 rows would only wait for its own sums.
template <class F> struct Tiling {
  long down, wide;
  INLINE explicit Tiling(long rows) : down(ceil_div(rows, TILE_ROWS)), wide(chunks_for<F>(ceil_div(rows, down))) {}
  INLINE long count(long chunks, long depth) const { return down * ceil_div(chunks, wide) * ceil_div(depth, depth_block); }
};

// Fetches panels into L2 while those before them are multiplied: a share of them beside each of `tiles` tiles. It pays if the
// panels come from beyond L2 and tiles are many; else the processor's own prefetching does better.
template <class W> struct Prefetch {
  Right<W> b;
  long chunks, depth, tiles, wide, block;  // rows of a panel: `depth`, and those of a depth_block

  INLINE bool is_worthwhile() const {
    constexpr long least_tiles = 6, least_bytes = 28 << 20;
    return tiles >= least_tiles && tiles * chunks * depth * chunk<W> * (long)sizeof(W) >= least_bytes;
  }

  // Share i of the panels of chunks [n, n + wide), a block of rows from k on. Inlined: GCC drops calls that only prefetch.
  INLINE void operator()(long n, long k, long i) const {
    long rows = min(block, depth - k);
    for (long end = min(n + wide, chunks); n < end; ++n) {
      const W *panel = b.data + n * b.stride + k * chunk<W>, *stop = panel + rows * (i + 1) / tiles * chunk<W>;
#pragma GCC unroll 4
      for (const W* row = panel + rows * i / tiles * chunk<W>; row < stop; row += chunk<W>) __builtin_prefetch(row, 0, 2);
    }
  }
};

// The sum over k < depth of the left operand's row times b.
template <class E> E dot(Left<E> a, long row, const E* b, long depth) {
  const E* left = a.data + a.row_at[row];
  Vec<E> total = broadcast(E(0));
  for (; depth >= chunk<E>; depth -= chunk<E>, left += a.stride, b += chunk<E>)
    for (int l = 0; l < chunk<E>; l += lanes<E>) total += load(left + l) * load(b + l);
  E rest = 0;
  for (long l = 0; l < depth; ++l) rest += left[l] * b[l];
  return sum(total) + rest;
}

struct Nothing {
  INLINE void operator()() const {}
};

// c = a b, or c += a b, for `rows` rows and `chunks` chunks of columns. The squares of the result are added to `squares`, if
// given. `beside` is called once a tile, to prefetch memory that is needed later.
template <class F, int k_stride = 1, class W = F, class Beside = Nothing>
void multiply(Left<F> a, long rows, Right<W> b, long chunks, long depth, Target<Sum<F>> c, bool is_added,
              Squares<Sum<F>> squares = {}, Beside beside = {}) {
  if (rows == 0) return;
  constexpr long left_bytes = 192 << 10;  // of the left operand, read again for every panel: they stay in L2
  Tiling<F> tiling(rows);
  long tiles = tiling.down, wide = tiling.wide;
  Prefetch<W> prefetch{b, chunks, ceil_div(depth, terms<F, W>), tiles, wide, depth_block / terms<F, W>};
  bool is_fetched = prefetch.is_worthwhile();
  long reach = max(1, left_bytes / (rows * (long)sizeof(F) * depth_block)) * depth_block;
  for (long far = 0; far == 0 || far < depth; far += reach)
    for (long n = 0; n < chunks; n += wide)
      for (long k = far, end = min(depth, far + reach); k == far || k < end; k += depth_block) {
        bool is_last = k + depth_block >= depth;
        bool is_deeper = k + depth_block < end;
        const W* panel = b.data + n * b.stride;
        Right<W> right{panel + k / terms<F, W> * chunk<W>, b.stride};
        if constexpr (has_scales<W>) right.scales = (const float*)(panel - chunk<W>);
        for (long i = 0, row = 0; i < tiles; ++i) {
          long next = rows * (i + 1) / tiles;
          Left<F> left{a.data + k / chunk<F> * a.stride, a.row_at + row, a.stride};
          Target<Sum<F>> to{c.data + n * c.stride, c.row_at + row, c.stride};
          tile_rows<F, W, k_stride>(next - row, min(wide, chunks - n), left, right, min(depth_block, depth - k), to,
                                    is_added || k > 0,
                                    {is_last ? squares.data : nullptr, squares.stride, squares.period, n, row});
          if (is_fetched)
            is_deeper ? prefetch(n, (k + depth_block) / terms<F, W>, i) : prefetch(n + wide, far / terms<F, W>, i);
          beside();
          row = next;
        }
      }
}

}  // namespace ISA
