// The norm: row sums, taken by each thread of a team over its chunks and then added, become 1 / sigma, and what
// backward subtracts.
#pragma once
#include "team.h"

namespace ISA {

inline double root(double x) { return __builtin_sqrt(x); }

// Row sums of one thread, and those that all threads have published.
template <class E> struct Sums {
  E* own;        // [max_sums, rows, lanes], added to by the kernels
  E* published;  // [threads, max_sums, rows], of all threads
  long rows, worker;

  E* at(int sum) const { return own + sum * rows * lanes<E>; }
  E* published_by(long thread, int sum) const { return published + (thread * max_sums + sum) * rows; }

  void clear(int sum, long count) const {
    E* p = at(sum);
    for (long i = 0; i < count * lanes<E>; ++i) p[i] = 0;
  }
  E local(int sum, long row) const { return ISA::sum(load(at(sum) + row * lanes<E>)); }
  void publish(int sum, long row, E value) const { published_by(worker, sum)[row] = value; }
  void publish(int sum, long count) const {
    for (long row = 0; row < count; ++row) publish(sum, row, local(sum, row));
  }
  E total(const Part& part, int sum, long row) const {
    E all = 0;
    for (long m = 0, first = worker - part.member; m < part.members; ++m) all += published_by(first + m, sum)[row];
    return all;
  }
};

// 1 / sigma of each group among gates [from, to) of one side from the gates' sums of squares, spread over its gates:
// scale [max_gates].
template <class E> void finish_norm(const Shape& s, const Part& part, const Sums<E>& sums, int side, int from, int to,
                                    double eps, long row, E* scale) {
  E squares[max_gates] = {};
  for (int g = from; g < to; ++g) squares[s.group_of[g]] += sums.total(part, side * max_gates + g, row);
  for (int g = from; g < to; ++g) scale[g] = (E)(1 / root(squares[s.group_of[g]] / s.group_size[s.group_of[g]] + eps));
}

// d v = scale * d_hat - v * correction for gates [from, to) of one side, where correction [max_gates] =
// scale^2 * mean(d_hat * hat).
// The mean of d_hat, which a norm also subtracts, is left to the centred weights: gradients.h centres their gradients instead.
template <class E>
void norm_correction(const Shape& s, const Part& part, const Sums<E>& sums, int side, int from, int to, long row,
                     const E* scale, E* correction) {
  E dots[max_gates] = {};
  for (int g = from; g < to; ++g) dots[s.group_of[g]] += sums.total(part, side * max_gates + g, row);
  for (int g = from; g < to; ++g) correction[g] = scale[g] * scale[g] * (E)(dots[s.group_of[g]] / s.group_size[s.group_of[g]]);
}

template <class E>
void norm_backward(const Shape& s, int from, int to, long first, long end, long rows, const E* scale, const E* correction,
                   Blocked<E> v, Blocked<E> d_v) {
  for (long n = first; n < end; ++n)
    for (int g = from; g < to; ++g)
      for (long row = 0; row < rows; ++row) {
        E *d = d_v.at(n * s.traits.gates + g, row), *product = v.at(n * s.traits.gates + g, row);
        for (int l = 0; l < chunk<E>; l += lanes<E>)
          store(d + l, load(d + l) * scale[row * max_gates + g] - load(product + l) * correction[row * max_gates + g]);
      }
}

// The sum of squares about `mean` over chunks [first, end) of one row of c.
template <class E> E squares_about(Blocked<E> c, const E* vectors, long first, long end, long row, E mean) {
  Vec<E> total = broadcast(E(0));
  for (long n = first; n < end; ++n)
    for (int l = 0; l < chunk<E>; l += lanes<E>) {
      Vec<E> d = (load(c.at(n, row) + l) - mean) * load(vectors + (n * vectors_a_chunk + valid) * chunk<E> + l);
      total += d * d;
    }
  return sum(total);
}

// Mean and 1 / sigma of c over whole rows, from each thread's share (Chan's formula joins the shares).
template <class E>
void norm_c(const Shape& s, const Part& part, const Sums<E>& sums, const FestinaCall& call, Blocked<E> c, const E* vectors,
            long rows, E* mean, E* scale) {
  auto count = [&](long member) {
    long first = s.H_chunks * member / part.members, end = s.H_chunks * (member + 1) / part.members;
    return (E)(min(end * chunk<E>, s.H) - first * chunk<E>);
  };
  long first = part.first(s.H_chunks), end = part.end(s.H_chunks);
  for (long row = 0; row < rows; ++row) {
    E own = call.rms ? E(0) : sums.local(sum_of_c, row) / count(part.member);
    sums.publish(sum_of_c, row, own);
    sums.publish(sum_of_c + 1, row, squares_about(c, vectors, first, end, row, own));
  }
  part.wait();
  for (long row = 0; row < rows; ++row) {
    E total = 0, squares = sums.total(part, sum_of_c + 1, row);
    auto own = [&](long m) { return sums.published_by(sums.worker - part.member + m, sum_of_c)[row]; };
    for (long m = 0; m < part.members; ++m) total += own(m) * count(m);
    mean[row] = total / (E)s.H;
    for (long m = 0; m < part.members; ++m) squares += count(m) * (own(m) - mean[row]) * (own(m) - mean[row]);
    scale[row] = (E)(1 / root((double)squares / (double)s.H + call.eps));
  }
}

}  // namespace ISA
