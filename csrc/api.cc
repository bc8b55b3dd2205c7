#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"

// The entry of libgomp, which is the OpenMP that torch loads. A pragma would do the same under GCC, but Clang makes it a call
// of its own libomp: two runtimes in a process, each with threads for all cores.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace {

void parallel(long threads, void* context, void (*body)(void*, long, long)) {
  if (threads == 1) return body(context, 0, 1);
  struct Job {
    void* context;
    void (*body)(void*, long, long);
  } job{context, body};
  auto run = [](void* data) {
    Job* job = (Job*)data;
    job->body(job->context, omp_get_thread_num(), omp_get_num_threads());
  };
  GOMP_parallel(run, &job, (unsigned)threads, 0);
}

constexpr uint64_t odd = 0x9e3779b97f4a7c15;

// Calls body(tensor, bytes) with every parameter of every direction; null where there is none.
template <class Body> void each_parameter(const FestinaCall& call, const festina::Kind& kind, Body body) {
  for (int64_t d = 0; d < call.directions; ++d)
    for (int i = 0; i < FESTINA_PARAMETERS; ++i)
      body((const char*)call.parameters[d][i], festina::parameter_bytes(call, kind, i));
}

// A hash of all values of all parameters. Threads take blocks in turn, and the sum over blocks does not depend on the order.
uint64_t digest_of_all(const FestinaCall& call, const festina::Kind& kind) {
  constexpr uint64_t block = 128 << 10;
  struct Shared {
    const FestinaCall& call;
    const festina::Kind& kind;
    uint64_t total;
  } shared{call, kind, 0};
  uint64_t all = 0;
  each_parameter(call, kind, [&](const char* tensor, uint64_t bytes) { all += tensor ? bytes : 0; });
  parallel(all > block ? call.threads : 1, &shared, [](void* context, long worker, long workers) {
    Shared* shared = (Shared*)context;
    uint64_t total = 0, number = 0;
    each_parameter(shared->call, shared->kind, [&](const char* tensor, uint64_t bytes) {
      for (uint64_t at = 0; tensor && at < bytes; at += block, ++number) {
        if ((long)(number % (uint64_t)workers) != worker) continue;
        uint64_t found = festina::chosen_isa()->digest(tensor + at, bytes - at < block ? bytes - at : block);
        total += (found ^ number * odd) * odd;
      }
    });
    __atomic_fetch_add(&shared->total, total, __ATOMIC_RELAXED);
  });
  return shared.total;
}

uint64_t fingerprint_of(const FestinaCall& call, const festina::Kind& kind, int is_whole) {
  constexpr uint64_t samples = 32;
  constexpr int chains = 4;  // independent chains hide the latency of multiplying
  uint64_t mixed[chains] = {};
  auto mix = [&](int chain, uint64_t value) {
    mixed[chain] = (mixed[chain] ^ value) * odd;
    mixed[chain] ^= mixed[chain] >> 29;
  };
  each_parameter(call, kind, [&](const char* tensor, uint64_t bytes) {
    uint64_t words = bytes / 2, stride = words / samples;
    mix(0, (uint64_t)tensor);
    for (uint64_t n = 0; tensor && !is_whole && n < samples && n < words; ++n) {
      uint16_t word;
      memcpy(&word, tensor + (stride ? n * stride + ((n * odd >> 40) * stride >> 24) : n) * 2, 2);  // one in each part
      mix(n % chains, word);
    }
  });
  for (int chain = 1; chain < chains; ++chain) mix(0, mixed[chain]);
  if (is_whole) mix(0, digest_of_all(call, kind));
  return mixed[0] ? mixed[0] : 1;
}

int run(const FestinaCall& call) { return festina::chosen_isa()->run(call, parallel) ? FESTINA_OK : FESTINA_ENDED; }

}  // namespace

int festina_version(void) { return FESTINA_VERSION; }

const char* festina_layout(void) {
  static const festina::Layout once;
  return once.text;
}

int festina_bytes(const FestinaCall* call, FestinaBytes* bytes) {
  festina::Kind kind;
  if (!bytes) return festina::fail("bytes must not be null");
  if (festina::check(call, false, kind)) return FESTINA_ERROR;
  FestinaCall fit = *call;
  fit.panels = fit.saved = fit.workspace = nullptr;
  *bytes = festina::chosen_isa()->bytes(fit);
  return FESTINA_OK;
}

int festina_run(const FestinaCall* call) {
  festina::Kind kind;
  return festina::check(call, true, kind) ? FESTINA_ERROR : run(*call);
}

void* festina_allocate(uint64_t bytes) {
  constexpr uint64_t huge_page = 2 << 20;
  if (bytes > FESTINA_MOST_BYTES) return nullptr;
  uint64_t unit = bytes < huge_page ? 64 : huge_page;
  void* memory = aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
#ifdef MADV_HUGEPAGE
  if (memory && unit == huge_page) madvise(memory, bytes / unit * unit, MADV_HUGEPAGE);  // not the last, half empty one
#endif
  return memory;
}

void festina_free(void* memory) { free(memory); }

uint64_t festina_fingerprint(const FestinaCall* call, int is_whole) {
  festina::Kind kind;
  return festina::check(call, false, kind) ? 0 : fingerprint_of(*call, kind, is_whole);
}

int festina_run_panels(const FestinaCall* call, int is_whole, uint64_t fingerprint) {
  festina::Kind kind;
  if (festina::check(call, true, kind)) return FESTINA_ERROR;
  return fingerprint_of(*call, kind, is_whole) == fingerprint ? run(*call) : FESTINA_STALE;
}

const char* festina_error(void) { return festina::error; }

const char* festina_isa(void) {
  const festina::Isa* isa = festina::chosen_isa();
  if (!isa) festina::fail("%s", festina::isa_refusal());
  return isa ? isa->name : nullptr;
}

const char* festina_isas(int runnable) { return festina::isa_names(runnable); }
