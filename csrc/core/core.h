// The three passes, as each thread runs them.
#pragma once
#include "forward.h"
#include "gradients.h"

namespace ISA {

template <class E> struct Core {
  const FestinaCall& call;
  Kernels<E> kernels;
  Shape s;
  Common common;
  ForwardBuffers<E> forward[2];
  BackwardBuffers<E> backward[2];
  uint64_t panels_bytes, workspace_bytes;
  char* threads_base;
  uint64_t thread_bytes;

  // Lays out every buffer; with the caller's null pointers, it only counts bytes.
  explicit Core(const FestinaCall& call) : call(call), kernels(kernels_for<E>(call)), s(shape_of<E>(call, kernels.traits)) {
    Arena work{(char*)call.workspace, 0}, panels{(char*)call.panels, 0}, saved{(char*)call.saved, 0};
    common = take_common(work, s);
    published = take_published<E>(work, s);
    if (call.pass != FESTINA_BACKWARD && !call.has_panels) row_sums = work.take<E>(s.mean_blocks() * sums_count());
    for (long d = 0; d < s.directions; ++d) {
      if (call.pass == FESTINA_BACKWARD)
        backward[d] = take_backward<E>(work, panels, saved, s, call, d);
      else
        forward[d] = take_forward<E>(work, panels, saved, s, call);
    }
    threads_base = work.base + work.used;
    thread_bytes = thread_memory(0, Arena{nullptr, 0}).bytes;
    work.used += thread_bytes * s.threads;
    panels_bytes = panels.used, workspace_bytes = work.used;
  }

  FestinaBytes bytes() const {
    SavedBound saved = saved_bound<E>(s, call);
    return {panels_bytes, saved.fixed, saved.per_row, workspace_bytes};
  }

  E* published;
  E* row_sums;  // forward, of each block of rows: [directions, weight_ih and weight_hh, groups, columns]
  long sums_count() const { return s.is_centred ? s.directions * s.groups * (s.I + s.P) : 0; }

  struct ThreadMemory {
    Scratch<E> scratch;
    E* d_vectors[2];
    Blocked<E> d_rows;
    uint64_t bytes;
  };
  ThreadMemory thread_memory(long worker, Arena arena) const {
    ThreadMemory memory{};
    memory.scratch = take_scratch<E>(arena, s, published, worker, call);
    if (call.pass == FESTINA_BACKWARD) {
      for (long d = 0; d < s.directions; ++d) memory.d_vectors[d] = arena.take<E>(vector_count());
      memory.d_rows = arena.take_blocked<E>(s.I_chunks, gradient_rows);
    }
    memory.bytes = arena.used;
    return memory;
  }
  long vector_count() const { return s.H_chunks * vectors_a_chunk * chunk<E>; }
  ThreadMemory thread_memory(long worker) const { return thread_memory(worker, {threads_base + worker * thread_bytes, 0}); }

  // Before the threads start.
  void begin() const {
    long* starts = common.starts;
    starts[0] = 0;
    for (long t = 0; t < s.T; ++t) starts[t + 1] = starts[t] + (call.batch_sizes ? call.batch_sizes[t] : s.B);
    *common.watch = {call.go_on, 0, 0, 0};
    for (long i = 0; i < 1 + 2 * s.threads; ++i) common.barriers[i] = {common.watch, 0, 0, false};
    for (int i = 0; i < task_lists; ++i) common.tasks[i] = {};
    if (call.pass == FESTINA_BACKWARD && call.d_input && s.directions == 2)  // both directions add to it
      __builtin_memset(call.d_input, 0, s.N * s.I * (is_narrow(call.type) ? sizeof(Half) : sizeof(E)));
  }

  void run(long worker, long workers) const {
    ThreadMemory memory = thread_memory(worker);
    for (long r = 0; r < memory.scratch.sums.rows; ++r) memory.scratch.chunk_at[r] = r * chunk<E>;
    Part part = part_of(s, common.starts, worker, workers, common.barriers, common.watch);
    if (call.pass == FESTINA_BACKWARD)
      run_backward(memory, part, worker, workers);
    else
      run_forward(memory, part, worker, workers);
  }

  bool wait(long workers) const { return common.barriers[0].wait(workers); }

  Means<E> means(long d) const { return call.pass == FESTINA_BACKWARD ? backward[d].saved.means : forward[d].panels.means; }

  Weight<E> weight(long d, int which) const {
    const void* const* p = call.parameters[d];
    if (which == FESTINA_WEIGHT_HR) return {Tensor<E>(p[which], call.type), 1, s.P, s.H, nullptr, 0};
    bool is_input = which == FESTINA_WEIGHT_IH;
    return {Tensor<E>(p[which], call.type),
            s.traits.gates,
            s.H,
            is_input ? s.I : s.P,
            is_input ? means(d).input : means(d).recurrent,
            is_input ? s.traits.gates : s.traits.centred_gates()};
  }

  void find_means(long worker, long workers) const {
    if (!s.is_centred) return;
    auto each = [&](auto body) {
      E* sums = row_sums;
      for (long d = 0; d < s.directions; ++d)
        for (int which = FESTINA_WEIGHT_IH; which <= FESTINA_WEIGHT_HH; ++which)
          if (Weight<E> w = weight(d, which); w.means) body(w, sums), sums += s.groups * w.columns;
    };
    each([&](Weight<E> w, E* sums) {
      long rows = w.gates * w.H, blocks = s.mean_blocks();
      for (long block = worker; block < blocks; block += workers)
        sum_rows(s, w, rows * block / blocks, rows * (block + 1) / blocks, sums + block * sums_count());
    });
    wait(workers);
    each([&](Weight<E> w, E* sums) {
      column_means(s, w, sums, sums_count(), w.columns * worker / workers, w.columns * (worker + 1) / workers);
    });
    wait(workers);
  }

  void fill_forward_panels(long worker, long workers) const {
    find_means(worker, workers);
    for (long d = 0; d < s.directions; ++d) {
      Panels<E> p = forward[d].panels;
      if (d % workers == worker) fill_vectors(s, call, call.parameters[d], p);
      Weight<E> input = weight(d, FESTINA_WEIGHT_IH), recurrent = weight(d, FESTINA_WEIGHT_HH);
      for (long n = worker; n < s.columns(); n += workers) {
        fill_panel(s, input, s.is_paired, n, p.input + n * s.panel_rows(s.I) * chunk<E>);
        if (!s.traits.is_diagonal) fill_panel(s, recurrent, s.is_paired, n, p.recurrent + n * s.panel_rows(s.P) * chunk<E>);
      }
      for (long n = worker; s.is_projected && n < s.P_chunks; n += workers)
        fill_panel(s, weight(d, FESTINA_WEIGHT_HR), false, n, p.projection + n * s.projection_rows() * chunk<E>);
    }
    wait(workers);
  }

  // Backward finds the means with what training has saved: by then the panels may be gone.
  void save_means(long worker, long workers) const {
    for (long d = worker; s.is_centred && d < s.directions; d += workers) {
      Means<E> from = forward[d].panels.means, to = forward[d].saved.means;
      __builtin_memcpy(to.input, from.input, s.groups * s.I * sizeof(E));
      if (from.recurrent) __builtin_memcpy(to.recurrent, from.recurrent, s.groups * s.P * sizeof(E));
    }
  }

  void run_forward(const ThreadMemory& memory, const Part& part, long worker, long workers) const {
    if (!call.has_panels) fill_forward_panels(worker, workers);
    if (call.pass == FESTINA_TRAINING) save_means(worker, workers);
    bool is_ended = part.is_idle;
    for (long d = part.direction; !is_ended && d < part.end_direction; ++d)
      is_ended = Forward<E>(call, s, kernels, part, memory.scratch, forward[d], common.starts, d).run();
  }

  void fill_backward_panels(long worker, long workers) const {
    for (long d = 0; d < s.directions; ++d) {
      Panels<E> p = backward[d].panels;
      if (d % workers == worker) fill_vectors(s, call, call.parameters[d], p);
      // Rows are ordered as the columns of products are, or gate after gate in panels of their own.
      auto fill = [&](int which, bool is_paired, long rows, bool is_apart, E* panels) {
        Weight<E> w = weight(d, which);
        long depth = (is_apart ? 1 : w.gates) * rows * chunk<E> / (is_paired ? 2 : 1);
        long apart = is_apart ? ceil_div(w.columns, chunk<E>) * chunk<E> * depth : 0;
        for (long n = worker; n < w.gates * rows; n += workers) {
          long gate = n % w.gates;
          fill_panel_rows(s, w, is_paired, gate, n / w.gates, is_apart ? n / w.gates : n, depth, panels + gate * apart);
        }
      };
      if (!s.traits.is_diagonal) fill(FESTINA_WEIGHT_HH, s.is_paired, s.H_chunks, s.traits.has_gated_h, p.recurrent);
      if (call.d_input) fill(FESTINA_WEIGHT_IH, s.is_paired, s.H_chunks, false, p.input);
      if (s.is_projected) fill(FESTINA_WEIGHT_HR, false, s.P_chunks, false, p.projection);
    }
  }

  void run_backward(const ThreadMemory& memory, const Part& part, long worker, long workers) const {
    for (long d = 0; d < s.directions; ++d)
      for (long w = worker; w < s.threads; w += workers) {
        E* vectors = thread_memory(w).d_vectors[d];
        for (long i = 0; i < vector_count(); ++i) vectors[i] = 0;
      }
    if (!call.has_panels) fill_backward_panels(worker, workers);
    wait(workers);
    E* collected[FESTINA_MOST_THREADS][2];
    for (long w = 0; w < s.threads; ++w)
      for (long d = 0; d < s.directions; ++d) collected[w][d] = thread_memory(w).d_vectors[d];
    Gradients<E> gradients{call, s, backward, common.segments, collected, memory.scratch, memory.d_rows, workers, part.teams};
    long together = s.directions / (part.end_direction - part.direction), round = 0;
    for (long begun = 0; begun < s.directions; begun += together) {
      long d = together == 1 ? begun : part.direction;
      gradients.direction = begun, gradients.end_direction = begun + together, gradients.is_first = true;
      if (run_segments(gradients, part, memory, d, worker, workers, round)) return;
    }
    common.tasks[task_lists - 1].share(part, [&](long task) { return gradients.finish(task); });
  }

  // All segments of one direction, or of both at once: first the recurrence, then the gradients summed over its rows. True if
  // the call is to end.
  bool run_segments(Gradients<E>& gradients, const Part& part, const ThreadMemory& memory, long d, long worker, long workers,
                    long& round) const {
    Backward<E> recurrence(call, s, kernels, part, memory.scratch, backward[d], memory.d_vectors[d], common.starts, d);
    for (bool has_steps_left = true; has_steps_left; ++round, gradients.is_first = false) {
      if (!part.is_idle) {
        Segment done = recurrence.run_segment();
        if (part.member == 0) common.segments[d * s.threads + part.team] = done;
      }
      if (wait(workers)) return true;
      has_steps_left = gradients.has_steps_left();
      Tasks *now = common.tasks + round % 2 * 3, *next = common.tasks + (round + 1) % 2 * 3;
      if (worker == 0) next[0] = next[1] = next[2] = {};
      if (s.is_paired) {
        now[0].share(part, [&](long task) { return gradients.pair(task); });
        if (wait(workers)) return true;
      }
      now[1].share(part, [&](long task) { return gradients.sum_segment(task); });
      if (wait(workers)) return true;
      if (!gradients.is_turn_needed()) continue;
      now[2].share(part, [&](long task) { return gradients.sum_turn(task); });
      if (wait(workers)) return true;
    }
    if (!part.is_idle) recurrence.finish();
    return false;
  }
};

}  // namespace ISA
