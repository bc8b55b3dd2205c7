#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "dispatch.h"
#include "layout.h"

// The entry of libgomp, which is the OpenMP that torch loads. A pragma would do the same under GCC, but Clang makes it a call
// of its own libomp: two runtimes in a process, each with threads for all cores.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace {

thread_local char error[512];

__attribute__((format(printf, 1, 2))) int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error, sizeof error, format, arguments);
  va_end(arguments);
  return FESTINA_ERROR;
}

int check(const FestinaCall* call) {
  if (!festina::chosen_isa()) return fail("%s", festina::isa_refusal());
  if (!festina::chosen_isa()->has_kernels(*call))
    return fail("there is no kernel for cell %s with placement %s and cell norm %s; see kernels.inc",
                festina::name_of("cell", call->cell), festina::name_of("placement", call->placement),
                festina::name_of("cell_norm", call->cell_norm));
  if (call->threads < 1 || call->threads > FESTINA_MOST_THREADS)
    return fail("threads must be 1 to %d, got %ld", FESTINA_MOST_THREADS, (long)call->threads);
  return FESTINA_OK;
}

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

// A hash of all values of all parameters. Threads take blocks in turn, and the sum over blocks does not depend on the order.
uint64_t digest_of_all(const FestinaCall* call, const FestinaSizes bytes) {
  constexpr uint64_t block = 128 << 10;
  struct Shared {
    const FestinaCall* call;
    const uint64_t (*bytes)[FESTINA_PARAMETERS];
    uint64_t total;
  } shared{call, bytes, 0};
  uint64_t all = 0;
  for (int i = 0; i < 2 * FESTINA_PARAMETERS; ++i) all += bytes[i / FESTINA_PARAMETERS][i % FESTINA_PARAMETERS];
  parallel(all > block ? call->threads : 1, &shared, [](void* context, long worker, long workers) {
    Shared* shared = (Shared*)context;
    uint64_t total = 0, number = 0;
    for (int i = 0; i < 2 * FESTINA_PARAMETERS; ++i) {
      const char* tensor = (const char*)shared->call->parameters[i / FESTINA_PARAMETERS][i % FESTINA_PARAMETERS];
      uint64_t size = tensor ? shared->bytes[i / FESTINA_PARAMETERS][i % FESTINA_PARAMETERS] : 0;
      for (uint64_t at = 0; at < size; at += block, ++number) {
        if ((long)(number % (uint64_t)workers) != worker) continue;
        uint64_t found = festina::chosen_isa()->digest(tensor + at, size - at < block ? size - at : block);
        total += (found ^ number * odd) * odd;
      }
    }
    __atomic_fetch_add(&shared->total, total, __ATOMIC_RELAXED);
  });
  return shared.total;
}

}  // namespace

int festina_version(void) { return FESTINA_VERSION; }

const char* festina_layout(void) {
  static const festina::Layout once;
  return once.text;
}

int festina_bytes(const FestinaCall* call, FestinaBytes* bytes) {
  if (check(call)) return FESTINA_ERROR;
  FestinaCall fit = *call;
  fit.panels = fit.saved = fit.workspace = nullptr;
  *bytes = festina::chosen_isa()->bytes(fit);
  return FESTINA_OK;
}

int festina_run(const FestinaCall* call) {
  if (check(call)) return FESTINA_ERROR;
  festina::chosen_isa()->run(*call, parallel);
  return FESTINA_OK;
}

void* festina_allocate(uint64_t bytes) {
  constexpr uint64_t huge_page = 2 << 20;
  uint64_t unit = bytes < huge_page ? 64 : huge_page;
  void* memory = aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
#ifdef MADV_HUGEPAGE
  if (memory && unit == huge_page) madvise(memory, bytes / unit * unit, MADV_HUGEPAGE);  // not the last, half empty one
#endif
  return memory;
}

void festina_free(void* memory) { free(memory); }

uint64_t festina_fingerprint(const FestinaCall* call, const FestinaSizes bytes, int is_whole) {
  constexpr uint64_t samples = 32;
  constexpr int chains = 4;  // independent chains hide the latency of multiplying
  uint64_t mixed[chains] = {};
  auto mix = [&](int chain, uint64_t value) {
    mixed[chain] = (mixed[chain] ^ value) * odd;
    mixed[chain] ^= mixed[chain] >> 29;
  };
  for (int i = 0; i < 2 * FESTINA_PARAMETERS; ++i) {
    const char* tensor = (const char*)call->parameters[i / FESTINA_PARAMETERS][i % FESTINA_PARAMETERS];
    uint64_t words = bytes[i / FESTINA_PARAMETERS][i % FESTINA_PARAMETERS] / 2, stride = words / samples;
    mix(0, (uint64_t)tensor);
    for (uint64_t n = 0; tensor && !is_whole && n < samples && n < words; ++n) {
      uint16_t word;
      memcpy(&word, tensor + (stride ? n * stride + ((n * odd >> 40) * stride >> 24) : n) * 2, 2);  // one in each part
      mix(n % chains, word);
    }
  }
  for (int chain = 1; chain < chains; ++chain) mix(0, mixed[chain]);
  if (is_whole) mix(0, digest_of_all(call, bytes));
  return mixed[0];
}

int festina_run_panels(const FestinaCall* call, const FestinaSizes bytes, int is_whole, uint64_t fingerprint) {
  return festina_fingerprint(call, bytes, is_whole) == fingerprint ? festina_run(call) : FESTINA_STALE;
}

const char* festina_error(void) { return error; }

const char* festina_isa(void) {
  const festina::Isa* isa = festina::chosen_isa();
  if (!isa) fail("%s", festina::isa_refusal());
  return isa ? isa->name : nullptr;
}

const char* festina_isas(int runnable) { return festina::isa_names(runnable); }
