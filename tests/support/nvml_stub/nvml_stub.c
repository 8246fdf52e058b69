/* A stand-in for libnvidia-ml.so.1 whose cards live in the file state.bin beside the library (see nvml_stub.py, which
 * writes it and lays out the same structures). Every call reads the file anew: what a test writes shows at once.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_CARDS 8
#define MAX_PROCESSES 8
#define MAX_FANS 4

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, LOST = 15,
       VERSION_MISMATCH = 25, UNKNOWN = 999 };

/* One name per switchable function: its place in this list is its place in codes[] and calls[]. */
#define FUNCTIONS(X) \
    X(handle) X(uuid) X(name) X(pci) X(capability) X(temperature_v) X(temperature) X(threshold) X(margin) X(fields) \
    X(power) X(enforced_limit) X(default_limit) X(limit_range) X(energy) X(memory) X(memory_v2) X(clock) X(max_clock) \
    X(utilisation) X(n_fans) X(fan) X(fan_v2) X(event_reasons) X(throttle_reasons) X(compute_processes) \
    X(graphics_processes) X(p2p) X(persistence) X(pcie_link) X(pcie_throughput) X(set_power_limit) X(set_threshold) \
    X(set_fan) X(default_fan) X(lock_clocks) X(reset_clocks)
#define NAME(f) F_##f,
enum { FUNCTIONS(NAME) N_FUNCTIONS };

typedef struct {
    char uuid[48], name[96], bus[32];
    int32_t capability[2], temperature_c, slowdown_c, shutdown_c, acoustic_c;
    int32_t margin_c, margin_slowdown_c, margin_shutdown_c;
    uint32_t power_mw, instant_mw, limit_mw, limit_default_mw, limit_min_mw, limit_max_mw;
    uint32_t sm_mhz, sm_max_mhz, locked_mhz, utilisation_pct, n_fans, fan_pct[MAX_FANS], fan_is_set[MAX_FANS];
    uint32_t persistence, pcie_gen, pcie_gen_max, pcie_width, pcie_width_max, p2p;
    uint32_t n_processes, pids[MAX_PROCESSES];
    uint32_t lost, hang, crash, n_stale_calls;
    uint32_t codes[N_FUNCTIONS], calls[N_FUNCTIONS];
    uint64_t energy_mj, energy_since_ns, total_bytes, reserved_bytes, used_bytes, reasons, process_bytes[MAX_PROCESSES];
} card_t;

typedef struct {
    uint32_t size, n_cards, init_code, delay_us;
    char driver[80], nvml[80];
    card_t cards[MAX_CARDS];
} state_t;

typedef struct { card_t *card; } handle_t; /* what nvmlDevice_t points to */
static handle_t handles[MAX_CARDS];
static state_t *state;
static int n_inits;

static int open_state(void) {
    Dl_info me;
    char path[4096];
    if (state) return OK;
    if (!dladdr((void *)open_state, &me) || !realpath(me.dli_fname, path)) return UNKNOWN;
    strcpy(strrchr(path, '/'), "/state.bin");
    int file = open(path, O_RDWR);
    if (file < 0) return UNKNOWN;
    state_t *mapped = mmap(NULL, sizeof(state_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped == MAP_FAILED || mapped->size != sizeof(state_t)) return UNKNOWN; /* the layouts differ */
    state = mapped;
    return OK;
}

/* What every call on a card goes through: hanging, crashing, being lost, and the code the test wants. */
static int enter(handle_t *h, int function) {
    if (!n_inits) return UNINITIALIZED;
    if (!h || !h->card) return INVALID_ARGUMENT;
    card_t *c = h->card;
    __sync_fetch_and_add(&c->calls[function], 1);
    if (state->delay_us) usleep(state->delay_us);
    while (*(volatile uint32_t *)&c->hang) usleep(5000);
    if (*(volatile uint32_t *)&c->crash) abort();
    if (*(volatile uint32_t *)&c->lost) {
        if (function != F_handle) __sync_fetch_and_add(&c->n_stale_calls, 1);
        return LOST;
    }
    return (int)c->codes[function];
}
#define ENTER(h, f) \
    do { int code_ = enter(h, F_##f); if (code_) return code_; } while (0)
#define CARD (h->card)

/* ------------------------------------------------------------------------------------------------------- the system */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = open_state();
    if (code) return code;
    if (state->init_code) return (int)state->init_code;
    for (int i = 0; i < MAX_CARDS; i++) handles[i].card = &state->cards[i];
    n_inits++;
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    if (!n_inits) return UNINITIALIZED;
    n_inits--;
    return OK;
}
const char *nvmlErrorString(int code) {
    static char text[40];
    snprintf(text, sizeof text, "stand-in error %d", code);
    return text;
}
static int say(char *out, unsigned size, const char *text) {
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}
int nvmlSystemGetDriverVersion(char *out, unsigned n) { return n_inits ? say(out, n, state->driver) : UNINITIALIZED; }
int nvmlSystemGetNVMLVersion(char *out, unsigned n) { return n_inits ? say(out, n, state->nvml) : UNINITIALIZED; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 12080; return n_inits ? OK : UNINITIALIZED; }
int nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }
int nvmlDeviceGetCount_v2(unsigned *out) {
    if (!n_inits) return UNINITIALIZED;
    *out = state->n_cards;
    return OK;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle_t **out) {
    if (!n_inits) return UNINITIALIZED;
    if (index >= state->n_cards) return INVALID_ARGUMENT;
    ENTER(&handles[index], handle);
    *out = &handles[index];
    return OK;
}
static int find(const char *text, size_t offset, handle_t **out) {
    if (!n_inits) return UNINITIALIZED;
    for (unsigned i = 0; i < state->n_cards; i++)
        if (!strcmp((char *)&state->cards[i] + offset, text)) return nvmlDeviceGetHandleByIndex_v2(i, out);
    return 6; /* NOT_FOUND */
}
int nvmlDeviceGetHandleByUUID(const char *uuid, handle_t **out) { return find(uuid, offsetof(card_t, uuid), out); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, handle_t **out) { return find(bus, offsetof(card_t, bus), out); }

/* -------------------------------------------------------------------------------------------------- what a card is */

int nvmlDeviceGetUUID(handle_t *h, char *out, unsigned n) { ENTER(h, uuid); return say(out, n, CARD->uuid); }
int nvmlDeviceGetName(handle_t *h, char *out, unsigned n) { ENTER(h, name); return say(out, n, CARD->name); }
int nvmlDeviceGetIndex(handle_t *h, unsigned *out) { ENTER(h, handle); *out = (unsigned)(h - handles); return OK; }
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
int nvmlDeviceGetPciInfo_v3(handle_t *h, pci_t *out) {
    ENTER(h, pci);
    memset(out, 0, sizeof *out);
    strcpy(out->bus_id, CARD->bus);
    return OK;
}
int nvmlDeviceGetCudaComputeCapability(handle_t *h, int *major, int *minor) {
    ENTER(h, capability);
    *major = CARD->capability[0], *minor = CARD->capability[1];
    return OK;
}
int nvmlDeviceGetTemperatureThreshold(handle_t *h, int kind, unsigned *out) {
    ENTER(h, threshold);
    int32_t value = kind == 0 ? CARD->shutdown_c : kind == 1 ? CARD->slowdown_c : kind == 5 ? CARD->acoustic_c : 0;
    *out = (unsigned)value;
    return value ? OK : NOT_SUPPORTED;
}
typedef struct { unsigned version; int margin; } margin_t;
int nvmlDeviceGetMarginTemperature(handle_t *h, margin_t *out) {
    ENTER(h, margin);
    if (out->version != 0x1000008) return VERSION_MISMATCH;
    out->margin = CARD->margin_c - CARD->temperature_c; /* margin_c: where the margin is used up */
    return OK;
}
int nvmlDeviceGetEnforcedPowerLimit(handle_t *h, unsigned *out) {
    ENTER(h, enforced_limit);
    *out = CARD->limit_mw;
    return OK;
}
int nvmlDeviceGetPowerManagementLimit(handle_t *h, unsigned *out) { return nvmlDeviceGetEnforcedPowerLimit(h, out); }
int nvmlDeviceGetPowerManagementDefaultLimit(handle_t *h, unsigned *out) {
    ENTER(h, default_limit);
    *out = CARD->limit_default_mw;
    return OK;
}
int nvmlDeviceGetPowerManagementLimitConstraints(handle_t *h, unsigned *low, unsigned *high) {
    ENTER(h, limit_range);
    *low = CARD->limit_min_mw, *high = CARD->limit_max_mw;
    return OK;
}
int nvmlDeviceGetMaxClockInfo(handle_t *h, int kind, unsigned *out) {
    (void)kind;
    ENTER(h, max_clock);
    *out = CARD->sm_max_mhz;
    return OK;
}
int nvmlDeviceGetPersistenceMode(handle_t *h, int *out) { ENTER(h, persistence); *out = (int)CARD->persistence; return OK; }
#define LINK(function, field) \
    int function(handle_t *h, unsigned *out) { ENTER(h, pcie_link); *out = CARD->field; return OK; }
LINK(nvmlDeviceGetCurrPcieLinkGeneration, pcie_gen)
LINK(nvmlDeviceGetMaxPcieLinkGeneration, pcie_gen_max)
LINK(nvmlDeviceGetCurrPcieLinkWidth, pcie_width)
LINK(nvmlDeviceGetMaxPcieLinkWidth, pcie_width_max)
int nvmlDeviceGetP2PStatus(handle_t *h, handle_t *other, int kind, int *out) {
    (void)other, (void)kind;
    ENTER(h, p2p);
    *out = (int)CARD->p2p;
    return OK;
}

/* ------------------------------------------------------------------------------------------------- what it does now */

int nvmlDeviceGetTemperature(handle_t *h, int sensor, unsigned *out) {
    (void)sensor;
    ENTER(h, temperature);
    *out = (unsigned)CARD->temperature_c;
    return OK;
}
typedef struct { unsigned version; int sensor, temperature; } temperature_t;
int nvmlDeviceGetTemperatureV(handle_t *h, temperature_t *out) {
    ENTER(h, temperature_v);
    if (out->version != 0x100000C) return VERSION_MISMATCH;
    out->temperature = CARD->temperature_c;
    return OK;
}
/* The counter as last written, and what the card's power has added since (where energy_since_ns says since when). */
static uint64_t energy_mj(const card_t *c) {
    struct timespec now;
    if (!c->energy_since_ns) return c->energy_mj;
    clock_gettime(CLOCK_REALTIME, &now);
    double s = (double)now.tv_sec + now.tv_nsec / 1e9 - c->energy_since_ns / 1e9;
    return c->energy_mj + (uint64_t)(s > 0 ? s * c->power_mw : 0);
}
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    int type, code;
    union { double d; uint32_t ui; uint64_t ull; int32_t si; } value;
} field_t;
_Static_assert(sizeof(field_t) == 40, "nvmlFieldValue_t");
int nvmlDeviceGetFieldValues(handle_t *h, int n, field_t *f) {
    ENTER(h, fields);
    for (int i = 0; i < n; i++) {
        f[i].code = OK;
        switch (f[i].field) {
        case 83: f[i].type = 3, f[i].value.ull = energy_mj(CARD), f[i].code = (int)CARD->codes[F_energy]; break;
        case 186: f[i].type = 1, f[i].value.ui = CARD->instant_mw, f[i].code = CARD->instant_mw ? OK : NOT_SUPPORTED; break;
        case 193: f[i].type = 5, f[i].value.si = CARD->margin_shutdown_c, f[i].code = (int)CARD->codes[F_margin]; break;
        case 194: f[i].type = 5, f[i].value.si = CARD->margin_slowdown_c, f[i].code = (int)CARD->codes[F_margin]; break;
        default: f[i].code = NOT_SUPPORTED;
        }
    }
    return OK;
}
int nvmlDeviceGetPowerUsage(handle_t *h, unsigned *out) { ENTER(h, power); *out = CARD->power_mw; return OK; }
int nvmlDeviceGetTotalEnergyConsumption(handle_t *h, uint64_t *out) { ENTER(h, energy); *out = energy_mj(CARD); return OK; }
typedef struct { uint64_t total, free, used; } memory_t;
int nvmlDeviceGetMemoryInfo(handle_t *h, memory_t *out) {
    ENTER(h, memory);
    out->total = CARD->total_bytes, out->used = CARD->used_bytes + CARD->reserved_bytes;
    out->free = out->total - out->used;
    return OK;
}
typedef struct { unsigned version; uint64_t total, reserved, free, used; } memory_v2_t;
int nvmlDeviceGetMemoryInfo_v2(handle_t *h, memory_v2_t *out) {
    ENTER(h, memory_v2);
    if (out->version != 0x02000028) return VERSION_MISMATCH;
    out->total = CARD->total_bytes, out->reserved = CARD->reserved_bytes, out->used = CARD->used_bytes;
    out->free = out->total - out->used - out->reserved;
    return OK;
}
int nvmlDeviceGetClockInfo(handle_t *h, int kind, unsigned *out) {
    (void)kind;
    ENTER(h, clock);
    *out = CARD->sm_mhz;
    return OK;
}
typedef struct { unsigned gpu, memory; } utilisation_t;
int nvmlDeviceGetUtilizationRates(handle_t *h, utilisation_t *out) {
    ENTER(h, utilisation);
    out->gpu = CARD->utilisation_pct, out->memory = 0;
    return OK;
}
int nvmlDeviceGetCurrentClocksEventReasons(handle_t *h, uint64_t *out) {
    ENTER(h, event_reasons);
    *out = CARD->reasons;
    return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(handle_t *h, uint64_t *out) {
    ENTER(h, throttle_reasons);
    *out = CARD->reasons;
    return OK;
}
int nvmlDeviceGetNumFans(handle_t *h, unsigned *out) { ENTER(h, n_fans); *out = CARD->n_fans; return OK; }
int nvmlDeviceGetFanSpeed(handle_t *h, unsigned *out) { ENTER(h, fan); *out = CARD->fan_pct[0]; return OK; }
int nvmlDeviceGetFanSpeed_v2(handle_t *h, unsigned fan, unsigned *out) {
    ENTER(h, fan_v2);
    if (fan >= CARD->n_fans) return INVALID_ARGUMENT;
    *out = CARD->fan_pct[fan];
    return OK;
}
int nvmlDeviceGetMinMaxFanSpeed(handle_t *h, unsigned *low, unsigned *high) {
    ENTER(h, n_fans);
    *low = 30, *high = 100;
    return OK;
}
int nvmlDeviceGetPcieThroughput(handle_t *h, int counter, unsigned *out) {
    (void)counter;
    ENTER(h, pcie_throughput);
    usleep(20000); /* as the real one does */
    *out = 0;
    return OK;
}
typedef struct { unsigned pid; uint64_t bytes; unsigned gpu_instance, compute_instance; } process_t;
static int processes(card_t *c, unsigned *n, process_t *out) {
    unsigned room = *n;
    *n = c->n_processes;
    if (room < c->n_processes) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < c->n_processes; i++)
        out[i] = (process_t){.pid = c->pids[i], .bytes = c->process_bytes[i]};
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(handle_t *h, unsigned *n, process_t *out) {
    ENTER(h, compute_processes);
    return processes(CARD, n, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(handle_t *h, unsigned *n, process_t *out) {
    (void)out;
    ENTER(h, graphics_processes);
    *n = 0;
    return OK;
}

/* ------------------------------------------------------------------------------------------------ what root may set */

int nvmlDeviceSetPowerManagementLimit(handle_t *h, unsigned mw) {
    ENTER(h, set_power_limit);
    if (mw < CARD->limit_min_mw || mw > CARD->limit_max_mw) return INVALID_ARGUMENT;
    CARD->limit_mw = mw;
    return OK;
}
int nvmlDeviceSetTemperatureThreshold(handle_t *h, int kind, int *celsius) {
    ENTER(h, set_threshold);
    if (kind != 5) return NOT_SUPPORTED;
    CARD->acoustic_c = *celsius;
    return OK;
}
int nvmlDeviceSetFanSpeed_v2(handle_t *h, unsigned fan, unsigned pct) {
    ENTER(h, set_fan);
    if (fan >= CARD->n_fans || pct > 100) return INVALID_ARGUMENT;
    CARD->fan_pct[fan] = pct, CARD->fan_is_set[fan] = 1;
    return OK;
}
int nvmlDeviceSetDefaultFanSpeed_v2(handle_t *h, unsigned fan) {
    ENTER(h, default_fan);
    if (fan >= CARD->n_fans) return INVALID_ARGUMENT;
    CARD->fan_is_set[fan] = 0;
    return OK;
}
int nvmlDeviceSetGpuLockedClocks(handle_t *h, unsigned low, unsigned high) {
    (void)low;
    ENTER(h, lock_clocks);
    CARD->locked_mhz = high;
    return OK;
}
int nvmlDeviceResetGpuLockedClocks(handle_t *h) { ENTER(h, reset_clocks); CARD->locked_mhz = 0; return OK; }
