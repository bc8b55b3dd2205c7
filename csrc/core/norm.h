// The norm: row sums, taken by each thread over its own units and put together, become 1 / sigma and its gradient.
#pragma once
#include "team.h"

namespace ISA {

inline double root(double x) { return __builtin_sqrt(x); }

// Row sums of one thread, and what its group has published of theirs.
template <class T> struct Sums {
  T* own;        // [max_sums, rows, lanes], added to by the kernels
  T* published;  // [threads, max_sums, rows], of all threads
  long rows, worker;

  T* at(int sum) const { return own + sum * rows * lanes<T>; }
  T* slot(long thread, int sum) const { return published + (thread * max_sums + sum) * rows; }

  void clear(int sum, long count) const {
    T* p = at(sum);
    for (long i = 0; i < count * lanes<T>; ++i) p[i] = 0;
  }
  T local(int sum, long row) const { return ISA::sum(load(at(sum) + row * lanes<T>)); }
  void publish(int sum, long row, T value) const { slot(worker, sum)[row] = value; }
  void publish(int sum, long count) const {
    for (long row = 0; row < count; ++row) publish(sum, row, local(sum, row));
  }
  T total(const Part& part, int sum, long row) const {
    T all = 0;
    for (long m = 0, first = worker - part.member; m < part.members; ++m) all += slot(first + m, sum)[row];
    return all;
  }
};

// 1 / sigma of each group of one side from the gates' sums of squares, spread over its gates: scale [max_gates].
template <class T> void finish_norm(const Shape& s, const Part& part, const Sums<T>& sums, int side, double eps, long row, T* scale) {
  T squares[max_gates] = {};
  for (int g = 0; g < s.traits.gates; ++g) squares[s.group_of[g]] += sums.total(part, side * max_gates + g, row);
  for (int g = 0; g < s.traits.gates; ++g)
    scale[g] = (T)(1 / root(squares[s.group_of[g]] / s.group_size[s.group_of[g]] + eps));
}

// d v = scale * d_hat - v * pull for one side, where pull = scale^2 * mean(d_hat * hat): [max_gates].
template <class T>
void norm_pull(const Shape& s, const Part& part, const Sums<T>& sums, int side, long row, const T* scale, T* pull) {
  T dots[max_gates] = {};
  for (int g = 0; g < s.traits.gates; ++g) dots[s.group_of[g]] += sums.total(part, side * max_gates + g, row);
  for (int g = 0; g < s.traits.gates; ++g)
    pull[g] = scale[g] * scale[g] * (T)(dots[s.group_of[g]] / s.group_size[s.group_of[g]]);
}

template <class T>
void norm_backward(const Shape& s, long first, long end, long rows, const T* scale, const T* pull, Blocked<T> v, Blocked<T> d_v) {
  for (long unit = first; unit < end; ++unit)
    for (int g = 0; g < s.traits.gates; ++g)
      for (long row = 0; row < rows; ++row) {
        T *d = d_v.at(unit * s.traits.gates + g, row), *from = v.at(unit * s.traits.gates + g, row);
        for (int l = 0; l < chunk<T>; l += lanes<T>)
          store(d + l, load(d + l) * scale[row * max_gates + g] - load(from + l) * pull[row * max_gates + g]);
      }
}

// The sum of squares about `mean` over units [first, end) of one row of c.
template <class T> T squares_about(Blocked<T> c, const T* vectors, long first, long end, long row, T mean) {
  Vec<T> total = broadcast(T(0));
  for (long unit = first; unit < end; ++unit)
    for (int l = 0; l < chunk<T>; l += lanes<T>) {
      Vec<T> d = (load(c.at(unit, row) + l) - mean) * load(vectors + (unit * vectors_a_unit + valid) * chunk<T> + l);
      total += d * d;
    }
  return sum(total);
}

// Mean and 1 / sigma of c over whole rows, from each thread's share (Chan's formula joins the shares).
template <class T>
void norm_c(const Shape& s, const Part& part, const Sums<T>& sums, const FestinaCall& call, Blocked<T> c, const T* vectors,
            long rows, T* mean, T* scale) {
  auto count = [&](long member) {
    long first = s.units * member / part.members, end = s.units * (member + 1) / part.members;
    return (T)(min(end * chunk<T>, s.H) - first * chunk<T>);
  };
  long first = part.first(s.units), end = part.end(s.units);
  for (long row = 0; row < rows; ++row) {
    T own = call.rms ? T(0) : sums.local(sum_of_c, row) / count(part.member);
    sums.publish(sum_of_c, row, own);
    sums.publish(sum_of_c + 1, row, squares_about(c, vectors, first, end, row, own));
  }
  part.wait();
  for (long row = 0; row < rows; ++row) {
    T total = 0, squares = sums.total(part, sum_of_c + 1, row);
    auto own = [&](long m) { return sums.slot(sums.worker - part.member + m, sum_of_c)[row]; };
    for (long m = 0; m < part.members; ++m) total += own(m) * count(m);
    mean[row] = total / (T)s.H;
    for (long m = 0; m < part.members; ++m) squares += count(m) * (own(m) - mean[row]) * (own(m) - mean[row]);
    scale[row] = (T)(1 / root((double)squares / (double)s.H + call.eps));
  }
}

}  // namespace ISA
