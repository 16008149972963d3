/* Every instruction of one call of the library, by single steps: see instructions.py.
 *
 *     instructions forward|backward float32|float64|float16|bfloat16 b o g k i s
 *
 * The child computes in one thread; what lies between its two breakpoints is counted. On the standard
 * output: the address of each instruction in the library, from its start, and how often it ran. */
#define _GNU_SOURCE
#include <fastnorm.h>

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    LIBRARY = 1 << 26, /* bytes of the library, at most */
    BREAKPOINT = 0xcc,
    REFUSED = 77 /* where no process may be traced */
};

static int dtype_of(const char *name)
{
    if (!strcmp(name, "float64")) return FASTNORM_FLOAT64;
    if (!strcmp(name, "float16")) return FASTNORM_FLOAT16;
    return strcmp(name, "bfloat16") ? FASTNORM_FLOAT32 : FASTNORM_BFLOAT16;
}

/* An array of the type: values, or ones. */
static void *array(int dtype, int64_t n, int of_values)
{
    char *a = aligned_alloc(64, ((size_t)n * sizeof(double) + 127) / 64 * 64);
    for (int64_t j = 0; a && j < n; j++) {
        const double wide = of_values ? (double)(j * 7919 % 1000) / 100 : 1;
        const float value = (float)wide;
        const _Float16 half = (_Float16)value;
        if (dtype == FASTNORM_FLOAT64) memcpy(a + 8 * j, &wide, 8);
        else if (dtype == FASTNORM_FLOAT32) memcpy(a + 4 * j, &value, 4);
        else if (dtype == FASTNORM_FLOAT16) memcpy(a + 2 * j, &half, 2);
        else memcpy(a + 2 * j, (const char *)&value + 2, 2);
    }
    return a;
}

static int compute(int backward, int dtype, const int64_t *size)
{
    const fastnorm_geometry geometry = {size[0], size[1], size[2], size[3], size[4], size[5]};
    const int64_t channels = size[2] * size[3], sets = size[0] * size[2] * size[5];
    const int64_t n = size[0] * size[1] * channels * size[4] * size[5];
    const int parameters = dtype == FASTNORM_FLOAT64 ? dtype : FASTNORM_FLOAT32;
    void *x = array(dtype, n, 1), *dy = array(dtype, n, 1), *y = array(dtype, n, 0);
    void *weight = array(parameters, channels, 0), *bias = array(parameters, channels, 0);
    void *dweight = array(parameters, channels, 0), *dbias = array(parameters, channels, 0);
    double *mean = calloc((size_t)sets, sizeof *mean), *rstd = calloc((size_t)sets, sizeof *rstd);
    const fastnorm_forward_args forward = {
        .struct_size = sizeof forward, .dtype = dtype, .param_dtype = parameters, .eps = 1e-5,
        .x = x, .y = y, .weight = weight, .bias = bias, .mean = mean, .rstd = rstd};
    const fastnorm_backward_args back = {
        .struct_size = sizeof back, .dtype = dtype, .param_dtype = parameters, .dy = dy, .x = x,
        .weight = weight, .mean = mean, .rstd = rstd, .dx = y, .dweight = dweight, .dbias = dbias};
    fastnorm_status status = fastnorm_forward(&geometry, &forward, NULL);
    if (backward && !status) status = fastnorm_backward(&geometry, &back, NULL); /* loads it */
    if (status) {
        fprintf(stderr, "%s\n", fastnorm_status_string(status));
        return EXIT_FAILURE;
    }
    __asm__ volatile("int3");
    if (backward) fastnorm_backward(&geometry, &back, NULL);
    else fastnorm_forward(&geometry, &forward, NULL);
    __asm__ volatile("int3");
    return EXIT_SUCCESS;
}

/* Where the library lies in a process. */
static int find_library(pid_t child, unsigned long *start, unsigned long *end)
{
    char path[64], line[4096];
    unsigned long from, to;
    snprintf(path, sizeof path, "/proc/%d/maps", (int)child);
    FILE *maps = fopen(path, "r");
    while (maps && fgets(line, sizeof line, maps)) {
        if (!strstr(line, "libfastnorm") || sscanf(line, "%lx-%lx", &from, &to) != 2) continue;
        if (!*start) *start = from;
        *end = to;
    }
    if (maps) fclose(maps);
    return *start && *end - *start <= LIBRARY;
}

int main(int count, char **words)
{
    static unsigned times[LIBRARY];
    int64_t size[6];
    int status;
    unsigned long start = 0, end = 0;
    struct user_regs_struct registers;
    if (count != 9) return EXIT_FAILURE;
    for (int j = 0; j < 6; j++) size[j] = atoll(words[3 + j]);
    const pid_t child = fork();
    if (child == 0) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(sched_getcpu(), &one);
        sched_setaffinity(0, sizeof one, &one);
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0) return REFUSED;
        return compute(words[1][0] == 'b', dtype_of(words[2]), size);
    }
    waitpid(child, &status, 0);
    if (WIFEXITED(status)) return WEXITSTATUS(status);
    if (!WIFSTOPPED(status) || !find_library(child, &start, &end)) return EXIT_FAILURE;
    for (;;) {
        ptrace(PTRACE_SINGLESTEP, child, NULL, NULL);
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status)) return EXIT_FAILURE;
        ptrace(PTRACE_GETREGS, child, NULL, &registers);
        if (registers.rip >= start && registers.rip < end) times[registers.rip - start]++;
        else if ((ptrace(PTRACE_PEEKTEXT, child, registers.rip, NULL) & 0xff) == BREAKPOINT) break;
    }
    kill(child, SIGKILL);
    for (unsigned at = 0; at < LIBRARY; at++)
        if (times[at]) printf("%x %u\n", at, times[at]);
    return EXIT_SUCCESS;
}
