// The passes, as each thread of the team goes through them.
#pragma once
#include "forward.h"
#include "gradients.h"

namespace ISA {

template <class T> struct Core {
  const FestinaCall& call;
  Kernels<T> kernels;
  Shape s;
  bool is_bfloat16;
  Common common;
  ForwardBuffers<T> forward[2];
  BackwardBuffers<T> backward[2];
  uint64_t panels_bytes, workspace_bytes;
  char* own_base;
  uint64_t own_bytes;

  // Places every buffer; the caller's null pointers make it a mere count.
  explicit Core(const FestinaCall& call) : call(call), kernels(kernels_for<T>(call)), s(shape_of<T>(call, kernels.traits)) {
    is_bfloat16 = call.type == FESTINA_BFLOAT16;
    Arena work{(char*)call.workspace, 0}, packed{(char*)call.panels, 0}, saved{(char*)call.saved, 0};
    common = take_common(work, s);
    published = take_published<T>(work, s);
    if (call.pass != FESTINA_BACKWARD && !call.has_panels) row_sums = work.take<T>(s.mean_blocks() * sums_count());
    for (long d = 0; d < s.directions; ++d) {
      if (call.pass == FESTINA_BACKWARD)
        backward[d] = take_backward<T>(work, packed, saved, s, call, d);
      else
        forward[d] = take_forward<T>(work, packed, saved, s, call);
    }
    own_base = work.base + work.used;
    own_bytes = own(0, Arena{nullptr, 0}).bytes;
    work.used += own_bytes * s.threads;
    panels_bytes = packed.used, workspace_bytes = work.used;
  }

  FestinaBytes bytes() const {
    uint64_t one = saved_bytes<T>(s, call, 1), per_row = (saved_bytes<T>(s, call, 1 + 16) - one) / 16;
    return {panels_bytes, one + 7 * per_row, per_row, workspace_bytes};  // padded_rows(N) <= padded_rows(1) + N + 7
  }

  T* published;
  T* row_sums;  // forward, of each block of rows: [directions, weight_ih and weight_hh, groups, columns]
  long sums_count() const { return s.is_centred ? s.directions * s.groups * (s.I + s.P) : 0; }

  // What belongs to one thread.
  struct Own {
    Scratch<T> scratch;
    T* d_vectors[2];
    Blocked<T> d_rows;
    uint64_t bytes;
  };
  Own own(long worker, Arena arena) const {
    Own o{};
    o.scratch = take_scratch<T>(arena, s, published, worker, call);
    if (call.pass == FESTINA_BACKWARD) {
      for (long d = 0; d < s.directions; ++d) o.d_vectors[d] = arena.take<T>(vector_count());
      o.d_rows = arena.take_blocked<T>(s.inputs, gradient_rows);
    }
    o.bytes = arena.used;
    return o;
  }
  long vector_count() const { return s.units * vectors_a_unit * chunk<T>; }
  Own own(long worker) const { return own(worker, {own_base + worker * own_bytes, 0}); }

  // Before the team starts.
  void begin() const {
    long* starts = common.starts;
    starts[0] = 0;
    for (long t = 0; t < s.T; ++t) starts[t + 1] = starts[t] + (call.batch_sizes ? call.batch_sizes[t] : s.B);
    for (long i = 0; i < 1 + 2 * s.threads; ++i) common.barriers[i] = {};
    for (int i = 0; i < task_lists; ++i) common.tasks[i] = {};
    if (call.pass == FESTINA_BACKWARD && call.d_input && s.directions == 2)  // both directions add to it
      __builtin_memset(call.d_input, 0, s.N * s.I * (is_bfloat16 ? 2 : sizeof(T)));
  }

  void run(long worker, long workers) const {
    Own mine = own(worker);
    for (long r = 0; r < mine.scratch.sums.rows; ++r) mine.scratch.chunk_at[r] = r * chunk<T>;
    Part part = part_of(s, common.starts, worker, workers, common.barriers);
    if (call.pass == FESTINA_BACKWARD)
      run_backward(mine, part, worker, workers);
    else
      run_forward(mine, part, worker, workers);
  }

  void wait(long workers) const { common.barriers[0].wait(workers); }

  Means<T> means(long d) const { return call.pass == FESTINA_BACKWARD ? backward[d].saved.means : forward[d].means; }

  Weight<T> weight(long d, int which) const {
    const void* const* p = call.parameters[d];
    if (which == FESTINA_WEIGHT_HR) return {Tensor<T>(p[which], call.type), 1, s.P, s.H, nullptr};
    bool is_input = which == FESTINA_WEIGHT_IH;
    return {Tensor<T>(p[which], call.type), s.traits.gates, s.H, is_input ? s.I : s.P,
            is_input ? means(d).input : means(d).recurrent};
  }

  void find_means(long worker, long workers) const {
    if (!s.is_centred) return;
    auto each = [&](auto body) {
      T* sums = row_sums;
      for (long d = 0; d < s.directions; ++d)
        for (int which = FESTINA_WEIGHT_IH; which <= FESTINA_WEIGHT_HH; ++which)
          if (Weight<T> w = weight(d, which); w.means) body(w, sums), sums += s.groups * w.columns;
    };
    each([&](Weight<T> w, T* sums) {
      long rows = w.gates * w.H, blocks = s.mean_blocks();
      for (long block = worker; block < blocks; block += workers)
        sum_rows(s, w, rows * block / blocks, rows * (block + 1) / blocks, sums + block * sums_count());
    });
    wait(workers);
    each([&](Weight<T> w, T* sums) {
      column_means(s, w, sums, sums_count(), w.columns * worker / workers, w.columns * (worker + 1) / workers);
    });
    wait(workers);
  }

  void pack_forward(long worker, long workers) const {
    find_means(worker, workers);
    for (long d = 0; d < s.directions; ++d) {
      Packed<T> p = forward[d].packed;
      if (d % workers == worker) pack_vectors(s, call, call.parameters[d], p);
      Weight<T> input = weight(d, FESTINA_WEIGHT_IH), recurrent = weight(d, FESTINA_WEIGHT_HH);
      for (long n = worker; n < s.columns(); n += workers) {
        pack_transposed(s, input, s.is_paired, n % s.traits.gates, n / s.traits.gates, p.input + n * s.depth(s.I) * chunk<T>);
        if (!s.traits.is_diagonal)
          pack_transposed(s, recurrent, s.is_paired, n % s.traits.gates, n / s.traits.gates,
                          p.recurrent + n * s.depth(s.P) * chunk<T>);
      }
      for (long n = worker; s.is_projected && n < s.width; n += workers)
        pack_transposed(s, weight(d, FESTINA_WEIGHT_HR), false, 0, n, p.projection + n * s.H * chunk<T>);
    }
    wait(workers);
  }

  void run_forward(const Own& mine, const Part& part, long worker, long workers) const {
    if (!call.has_panels) pack_forward(worker, workers);
    for (long d = part.direction; !part.is_idle && d < part.end_direction; ++d)
      Forward<T>(call, s, kernels, part, mine.scratch, forward[d], common.starts, d).run();
  }

  void pack_backward(long worker, long workers) const {
    for (long d = 0; d < s.directions; ++d) {
      const BackwardBuffers<T>& b = backward[d];
      Packed<T> vectors = b.vectors;
      if (d % workers == worker) pack_vectors(s, call, call.parameters[d], vectors);
      auto pack = [&](int which, bool is_paired, long rows, T* panels) {
        Weight<T> w = weight(d, which);
        long depth = w.gates * rows * chunk<T> / (is_paired ? 2 : 1);
        for (long n = worker; n < w.gates * rows; n += workers)
          pack_straight(s, w, is_paired, n % w.gates, n / w.gates, depth, panels);
      };
      if (!s.traits.is_diagonal) pack(FESTINA_WEIGHT_HH, s.is_paired, s.units, b.recurrent);
      if (call.d_input) pack(FESTINA_WEIGHT_IH, s.is_paired, s.units, b.input);
      if (s.is_projected) pack(FESTINA_WEIGHT_HR, false, s.width, b.projection);
    }
  }

  void run_backward(const Own& mine, const Part& part, long worker, long workers) const {
    for (long d = 0; d < s.directions; ++d)
      for (long w = worker; w < s.threads; w += workers) {
        T* mine = own(w).d_vectors[d];
        for (long i = 0; i < vector_count(); ++i) mine[i] = 0;
      }
    pack_backward(worker, workers);
    wait(workers);
    T* collected[FESTINA_MOST_THREADS][2];
    for (long w = 0; w < s.threads; ++w)
      for (long d = 0; d < s.directions; ++d) collected[w][d] = own(w).d_vectors[d];
    Gradients<T> gradients{call, s, backward, common.stretches, collected, mine.scratch, mine.d_rows, workers, part.groups, 0, 0, true};
    long together = s.directions / (part.end_direction - part.direction), round = 0;
    for (long begun = 0; begun < s.directions; begun += together) {
      long d = together == 1 ? begun : part.direction;
      gradients.direction = begun, gradients.end_direction = begun + together, gradients.is_first = true;
      go_back(gradients, part, mine, d, worker, workers, round);
    }
    common.tasks[task_lists - 1].share([&](long task) { return gradients.finish(task); });
  }

  // Stretch after stretch of one direction, or of both at once: first the recurrence, then the sums over its rows.
  void go_back(Gradients<T>& gradients, const Part& part, const Own& mine, long d, long worker, long workers, long& round) const {
    Backward<T> recurrence(call, s, kernels, part, mine.scratch, backward[d], mine.d_vectors[d], common.starts, d);
    for (bool goes_on = true; goes_on; ++round, gradients.is_first = false) {
      if (!part.is_idle) {
        Stretch done = recurrence.go_back();
        if (part.member == 0) common.stretches[d * s.threads + part.group] = done;
      }
      wait(workers);
      goes_on = gradients.goes_on();
      Tasks *now = common.tasks + round % 2 * 3, *next = common.tasks + (round + 1) % 2 * 3;
      if (worker == 0) next[0] = next[1] = next[2] = {};
      if (s.is_paired) {
        now[0].share([&](long task) { return gradients.pair(task); });
        wait(workers);
      }
      now[1].share([&](long task) { return gradients.sum_stretch(task); });
      wait(workers);
      if (!gradients.is_turn_needed()) continue;
      now[2].share([&](long task) { return gradients.sum_turn(task); });
      wait(workers);
    }
    if (!part.is_idle) recurrence.finish();
  }
};

}  // namespace ISA
