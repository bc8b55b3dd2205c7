#include "dispatch.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define ISA_LINE(name, condition) \
  namespace name {                \
  extern const festina::Isa isa;  \
  }
#include "isas.inc"
#undef ISA_LINE

namespace festina {
namespace {

#if defined(__x86_64__)
// Before GCC 11 __builtin_cpu_supports does not know it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct Candidate {
  const Isa* isa;
  bool is_runnable;
};

struct Choice {
  const Isa* isa = nullptr;
  char refusal[256] = "", all[64] = "", runnable[64] = "";

  Choice() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    const Candidate candidates[] = {
#define ISA_LINE(name, condition) {&name::isa, condition},
#include "isas.inc"
#undef ISA_LINE
    };
    const char* wanted = getenv("FESTINA_ISA");
    for (const Candidate& c : candidates) {
      append(all, c.isa->name);
      if (!c.is_runnable) continue;
      append(runnable, c.isa->name);
      if (!isa && (!wanted || !*wanted || !strcmp(wanted, c.isa->name))) isa = c.isa;
    }
    if (!isa) {
      strcpy(refusal, "FESTINA_ISA is ");
      strncat(refusal, wanted ? wanted : "not set", 40);
      strcat(refusal, ", but this CPU runs: ");
      strcat(refusal, runnable);
    }
  }

  static void append(char* list, const char* name) {
    if (*list) strcat(list, " ");
    strcat(list, name);
  }
};

const Choice& choice() {
  static const Choice once;
  return once;
}

}  // namespace

const Isa* chosen_isa() { return choice().isa; }
const char* isa_refusal() { return choice().refusal; }
const char* isa_names(bool is_runnable) { return is_runnable ? choice().runnable : choice().all; }

}  // namespace festina
