/* Which kernels this processor runs, and how large its caches are: filled once at load. */
#include "task.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif !defined(_WIN32)
#include <unistd.h>
#endif

#define DECLARE(type, level)                                 \
    void rows_forward_##type##_##level(const fn_task *);     \
    void rows_backward_##type##_##level(const fn_task *);    \
    void columns_forward_##type##_##level(const fn_task *);  \
    void columns_backward_##type##_##level(const fn_task *); \
    size_t rows_scratch_##type##_##level(const fn_task *);   \
    size_t columns_scratch_##type##_##level(const fn_task *); \
    void across_forward_##type##_##level(const fn_task *);   \
    void across_backward_##type##_##level(const fn_task *);  \
    size_t across_scratch_##type##_##level(const fn_task *);

#define TABLE(type, level)                                                    \
    {rows_forward_##type##_##level,     rows_backward_##type##_##level,       \
     columns_forward_##type##_##level,  columns_backward_##type##_##level,    \
     rows_scratch_##type##_##level,     columns_scratch_##type##_##level,     \
     across_forward_##type##_##level,   across_backward_##type##_##level,     \
     across_scratch_##type##_##level}

#define DECLARE_ALL(level) \
    DECLARE(float32, level) DECLARE(float64, level) DECLARE(float16, level) DECLARE(bfloat16, level)

/* A level's kernels in the order of fastnorm_dtype. */
#define TABLES(level) \
    {TABLE(float32, level), TABLE(float64, level), TABLE(float16, level), TABLE(bfloat16, level)}

#if defined(FASTNORM_X86_LEVELS)
DECLARE_ALL(v2) DECLARE_ALL(v3) DECLARE_ALL(v4)
static const fn_kernels kernels[][4] = {TABLES(v2), TABLES(v3), TABLES(v4)};
static const char *const names[] = {"v2", "v3", "v4"};
enum { FIRST_LEVEL = FASTNORM_ISA_V2 };
#else
DECLARE_ALL(baseline)
static const fn_kernels kernels[][4] = {TABLES(baseline)};
static const char *const names[] = {"baseline"};
enum { FIRST_LEVEL = FASTNORM_ISA_BEST };
#endif

static int highest = FIRST_LEVEL; /* that the processor has */
static int best = FIRST_LEVEL;    /* the same, or the lower one that FASTNORM_ISA names */
static int64_t l2_bytes = 512 << 10;
static int64_t last_level_bytes = 8 << 20;
static int distant;  /* the last level is about as far as memory */
static int foresees; /* what is read in order is there before it is asked for */

#if defined(__x86_64__)
/* Bytes of the data cache of a level, 0 where cpuid does not say. sysconf answers from the same
 * instruction, but glibc 2.36 multiplies the third level by cores that a virtual machine does
 * not have. */
static int64_t cache_bytes(unsigned level)
{
    unsigned a, b, c, d, leaf = 4;
    if (__get_cpuid(0x80000000u, &a, &b, &c, &d) && a >= 0x8000001du &&
        __get_cpuid_count(0x8000001du, 0, &a, &b, &c, &d) && (a & 31) != 0)
        leaf = 0x8000001du; /* AMD's twin of leaf 4 */
    for (unsigned index = 0; __get_cpuid_count(leaf, index, &a, &b, &c, &d) && (a & 31); index++)
        if ((a & 31) != 2 && (a >> 5 & 7) == level)
            return ((int64_t)(b >> 22) + 1) * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) *
                   ((int64_t)c + 1);
    return 0;
}
#elif defined(__APPLE__)
static int64_t told(const char *name)
{
    int64_t value = 0; /* some are of 32 bits */
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 ? value : 0;
}

/* The fast cores share a second level, which is the last that the system tells of. */
static int64_t cache_bytes(unsigned level)
{
    const int64_t cores = told("hw.perflevel0.cpusperl2");
    return told("hw.perflevel0.l2cachesize") / (level == 2 && cores > 0 ? cores : 1);
}
#else
static int64_t cache_bytes(unsigned level)
{
#if defined(_SC_LEVEL3_CACHE_SIZE)
    return sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#else
    return level * 0;
#endif
}
#endif

static int64_t from_environment(const char *name, int64_t otherwise)
{
    const char *text = getenv(name);
    long long value = text ? atoll(text) : 0;
    return value > 0 ? value : otherwise;
}

/* A last level of more than 96 MB, which is the most that a few cores share, is that of all cores of
 * a large server. What lies there comes no faster than from memory (480 MB of a Xeon, two threads:
 * plain stores 1.0 to 1.7 times as long as streamed ones from 12 MB moved on), so that what leaves
 * the second level is lost: calls that count on less of both, and stream what all second levels
 * have no room for, took 0.5 to 1.2 of the time, 0.9 in the mean. */
static void count_on_second_levels(void)
{
    const int64_t most = fn_available_threads() * 2 * l2_bytes;
    distant = last_level_bytes > 96 << 20;
    if (!distant) return;
    if (last_level_bytes > most) last_level_bytes = most;
    l2_bytes /= 2;
}

__attribute__((constructor)) static void look_at_processor(void)
{
#if defined(__x86_64__)
    unsigned a, b = 0, c = 0, d;
    foresees = __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
#endif
#if defined(FASTNORM_X86_LEVELS)
    const char *wanted = getenv("FASTNORM_ISA");
    const int has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C); /* clang 14 has no name */
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2") && has_f16c)
        highest = FASTNORM_ISA_V3;
    if (highest == FASTNORM_ISA_V3 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        highest = FASTNORM_ISA_V4;
    best = highest;
    for (int level = FASTNORM_ISA_V2; wanted && level < highest; level++)
        if (strcmp(wanted, names[level - FIRST_LEVEL]) == 0) best = level;
#endif
    if (cache_bytes(2) > 0) l2_bytes = cache_bytes(2);
    if (cache_bytes(3) > 0) last_level_bytes = cache_bytes(3);
    if (!getenv("FASTNORM_LAST_LEVEL_BYTES")) count_on_second_levels();
    l2_bytes = from_environment("FASTNORM_L2_BYTES", l2_bytes);
    last_level_bytes = from_environment("FASTNORM_LAST_LEVEL_BYTES", last_level_bytes);
}

const fn_kernels *fn_find_kernels(int32_t dtype, int32_t isa)
{
    int level = isa == FASTNORM_ISA_BEST ? best : isa;
    if (level < FIRST_LEVEL || level > highest) return NULL;
    return &kernels[level - FIRST_LEVEL][dtype - FASTNORM_FLOAT32];
}

const char *fastnorm_isa_name(void) { return names[best - FIRST_LEVEL]; }
int64_t fn_l2_bytes(void) { return l2_bytes; }
int64_t fn_last_level_bytes(void) { return last_level_bytes; }
int fn_foresees(void) { return foresees; }
int64_t fn_near_bytes(int threads)
{
    return l2_bytes + (distant ? 0 : last_level_bytes / (threads > 0 ? threads : 1));
}
