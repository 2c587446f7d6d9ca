// The convolutions, sums and resizings of a forward on a CPU, each in one pass over memory, for one image.
//
// A separable convolution is computed tile by tile: its depthwise half fills a tile that stays in the cache, and the
// matrix product of the 1x1 half takes it from there, adds bias and residual, applies ReLU and stores.
//
// Legend: T float or bfloat16 (sums are always float). V floats in a vector. Maps are [h,w,c], c a multiple of V.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16, PANEL = 4;  // 6 x 4 sums, 4 weights and 1 input fill 29 of 32 registers
#elif defined(__AVX__)
constexpr int V = 8, PANEL = 2;  // 6 x 2 + 2 + 1 of 16
#elif defined(__aarch64__)
constexpr int V = 4, PANEL = 4;  // 29 of 32
#else
constexpr int V = 4, PANEL = 2;  // 15 of 16
#endif
constexpr int ROWS = 6;          // pixels that the matrix product takes at a time
constexpr int TILE = 16 * ROWS;  // pixels of a tile, at most: 96 x 512 floats are 192 KiB, inside an L2 cache
constexpr int SMALL_GATE_FACTOR = 4;  // of space.py
constexpr int RGB_ROW = 9;       // inputs in a row of the first convolution's 3 x 3 patch
constexpr int LINE = 64;         // bytes that memory comes in
constexpr int SUMS = 32;         // parts that a sum over all pixels is made of
constexpr int PARTS = 8;         // of the work of each thread, so that none waits long for another that was held up

typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));

struct bfloat16 {
    uint16_t bits;
};

// Keeps the compiler from loading the value again for each of its uses.
inline void in_register([[maybe_unused]] vec& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

inline vec splat(float x) { return vec{} + x; }
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
#if defined(__AVX512F__)
inline vec maximum(vec low, vec x) { return (vec)_mm512_max_ps((__m512)low, (__m512)x); }  // x where x is NaN
#else
inline vec maximum(vec low, vec x) { return x < low ? low : x; }
#endif

#if defined(__AVX512BF16__)
inline vec load(const bfloat16* p) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
inline void store(bfloat16* p, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

// ---- threads -------------------------------------------------------------------------------------------------------

// Workers that wait for the next piece of work: spinning for a moment, since pieces follow each other within
// microseconds, then asleep.
class Pool {
  public:
    // Calls work(task) for every task in 0..tasks, in `threads` threads, this one among them.
    template <class Work>
    void run(long tasks, int threads, const Work& work) {
        std::unique_lock<std::mutex> alone(busy, std::try_to_lock);
        if (threads <= 1 || tasks <= 1 || !alone.owns_lock()) {  // also when another thread has the workers
            for (long task = 0; task < tasks; ++task) work(task);
            return;
        }
        while (int(workers.size()) < threads - 1) {
            int number = int(workers.size());
            workers.emplace_back([this, number] { serve(number); });
            workers.back().detach();
        }
        call = [](const void* w, long task) { (*static_cast<const Work*>(w))(task); };
        argument = &work;
        total = tasks;
        next.store(0, std::memory_order_relaxed);
        helpers = threads - 1;
        running.store(threads - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(lock);
            turn.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
        take();
        for (long spin = 0; running.load(std::memory_order_acquire) > 0; ++spin) pause(spin);
    }

    // Calls work(y) for every row y of 0..h; neighbours in the same thread, since they read the same rows.
    template <class Work>
    void rows(long h, int threads, const Work& work) {
        const long parts = std::min(h, long(threads) * PARTS);
        run(parts, threads, [&](long part) {
            for (long y = part * h / parts; y < (part + 1) * h / parts; ++y) work(y);
        });
    }

  private:
    static constexpr long SPINS = 10000;  // some 200 microseconds

    static void pause(long spin) {
        if (spin > SPINS) {
            std::this_thread::yield();  // somebody else needs this core: perhaps the worker that is waited for
            return;
        }
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void take() {
        for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < total;) call(argument, task);
    }

    void serve(int number) {
        for (unsigned seen = 0;;) {
            for (long spin = 0; spin < SPINS && turn.load(std::memory_order_acquire) == seen; ++spin) pause(spin);
            if (turn.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> guard(lock);
                wake.wait(guard, [&] { return turn.load(std::memory_order_acquire) != seen; });
            }
            seen = turn.load(std::memory_order_acquire);
            if (number < helpers) {
                take();
                running.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    std::mutex busy, lock;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::atomic<unsigned> turn{0};
    std::atomic<long> next{0};
    std::atomic<int> running{0};
    void (*call)(const void*, long) = nullptr;
    const void* argument = nullptr;
    long total = 0;
    int helpers = 0;
};

// A forked child has none of its parent's threads: it starts with a pool of its own.
Pool* pool = nullptr;
void new_pool() { pool = new Pool(); }
__attribute__((constructor)) void on_load() {
    new_pool();
    pthread_atfork(nullptr, nullptr, new_pool);
}

// Memory of this thread for one use at a time; grows, never shrinks.
char* scratch(size_t bytes) {
    thread_local std::vector<char> own;
    if (own.size() < bytes + LINE) own.resize(bytes + LINE);
    return own.data() + (LINE - reinterpret_cast<uintptr_t>(own.data()) % LINE) % LINE;
}

// Asks for memory in large pages: fresh memory in small ones costs more time than what is written there.
void large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// ---- convolution ---------------------------------------------------------------------------------------------------

// Rows first .. first + rows of a feature map of h x w pixels; row first + rows takes the place of row `first`, so that
// a few rows can wander down a map of which no more is kept.
struct Map {
    void* data;
    int32_t h, w, c, first, rows;
};

struct Conv {
    int32_t depthwise;  // 1: depthwise k x k, then 1x1. 0: k x k, as a product with patches
    int32_t kernel, stride, padding;
    int32_t wide;     // the output is float, whatever the inputs are
    int32_t inputs, outputs;  // channels of the maps, in whole vectors (an image has 3)
    const void* weights;      // panels of PANEL * V outputs: [inputs][outputs], bfloat16 [inputs / 2][outputs][2]
    const float* bias;        // [outputs]
    const float* taps;        // depthwise: [k * k][inputs]
};

// An image as the caller has it, and its normalisation.
struct Image {
    const void* data;
    int64_t channel_step, row_step, column_step;  // in elements
    int32_t height, width, bytes;                 // bytes: 0..255; otherwise float in 0..1
    float mean[3], std[3];
};

// What arrives at a node from one of its three sides, to be multiplied by a gate's activation.
struct Arrival {
    const void* data;
    float weight;
    int32_t halved;  // of half the height and width: resized bilinearly
};

template <class T>
const T* row_of(const Map& map, int y) {
    return static_cast<const T*>(map.data) + long((y - map.first) % map.rows) * map.w * map.c;
}

// k x k taps, stride S: BLOCK pixels of an output row from the k input rows (null outside the map), of which the first
// `valid` are stored. `left` is the first column that is read; EDGE: some columns lie outside the map.
template <class T, int K, int S, int BLOCK, bool EDGE>
inline void depthwise_block(const T* const* rows, const Map& in, int left, int valid, const float* taps, T* out) {
    constexpr int COLUMNS = (BLOCK - 1) * S + K;
    const long c = in.c;
    for (long i = 0; i < c; i += V) {
        vec sum[BLOCK] = {};
#pragma GCC unroll 8
        for (int ty = 0; ty < K; ++ty) {
            if (!rows[ty]) continue;
            const T* from = rows[ty] + left * c + i;
            vec weight[K];
#pragma GCC unroll 8
            for (int tx = 0; tx < K; ++tx) weight[tx] = load(taps + (ty * K + tx) * c + i);
#pragma GCC unroll 32
            for (int column = 0; column < COLUMNS; ++column) {
                if (EDGE && (left + column < 0 || left + column >= in.w)) continue;
                vec value = load(from + column * c);
                in_register(value);
#pragma GCC unroll 8
                for (int o = 0; o < BLOCK; ++o)
                    if (column - o * S >= 0 && column - o * S < K) sum[o] += weight[column - o * S] * value;
            }
        }
#pragma GCC unroll 8
        for (int o = 0; o < BLOCK; ++o)
            if (!EDGE || o < valid) store(out + o * c + i, sum[o]);
    }
}

// Pixels x0..x1 of an output row, to out [x1-x0][c].
template <class T, int K, int S>
void depthwise_row(const T* const* rows, const Map& in, int padding, int x0, int x1, const float* taps, T* out) {
    constexpr int BLOCK = V == 16 && S == 1 && K == 3 ? 8 : 4;  // that share the inputs they load, in registers
    constexpr int COLUMNS = (BLOCK - 1) * S + K;
    for (int x = x0; x < x1; x += BLOCK) {
        if (x + BLOCK > x1) x = std::max(x0, x1 - BLOCK);  // the last one computes some pixels again
        const int left = x * S - padding, valid = std::min(BLOCK, x1 - x);
        const bool inside = left >= 0 && left + COLUMNS <= in.w && valid == BLOCK;
        auto go = inside ? depthwise_block<T, K, S, BLOCK, false> : depthwise_block<T, K, S, BLOCK, true>;
        go(rows, in, left, valid, taps, out + long(x - x0) * in.c);
    }
}

template <class T>
void depthwise(const Conv& conv, const Map& in, int y, int x0, int x1, T* out) {
    const T* rows[5];
    for (int t = 0; t < conv.kernel; ++t) {
        int from = y * conv.stride - conv.padding + t;
        rows[t] = from >= 0 && from < in.h ? row_of<T>(in, from) : nullptr;
    }
    auto go = conv.kernel == 3 ? (conv.stride == 1 ? depthwise_row<T, 3, 1> : depthwise_row<T, 3, 2>)
                               : (conv.stride == 1 ? depthwise_row<T, 5, 1> : depthwise_row<T, 5, 2>);
    go(rows, in, conv.padding, x0, x1, conv.taps, out);
}

// The k x k x c inputs of each of the pixels x0..x1 of an output row, side by side: out [x1-x0][depth].
template <class T>
void patches(const Conv& conv, const Map& in, int y, int x0, int x1, int depth, T* out) {
    const int k = conv.kernel, c = in.c;
    for (int x = x0; x < x1; ++x, out += depth) {
        const int left = x * conv.stride - conv.padding;
        const int begin = std::max(0, -left), end = std::min(k, in.w - left);
        const bool inside = begin == 0 && end == k;
        for (int t = 0; t < k; ++t) {
            const int from = y * conv.stride - conv.padding + t;
            T* to = out + t * k * c;
            if (from < 0 || from >= in.h) {
                std::memset(to, 0, sizeof(T) * k * c);
                continue;
            }
            if (inside && k * c == RGB_ROW) {  // of a size that the compiler knows
                std::memcpy(to, row_of<T>(in, from) + long(left) * c, sizeof(T) * RGB_ROW);
                continue;
            }
            if (!inside) std::memset(to, 0, sizeof(T) * k * c);
            std::memcpy(to + begin * c, row_of<T>(in, from) + long(left + begin) * c, sizeof(T) * (end - begin) * c);
        }
        std::memset(out + k * k * c, 0, sizeof(T) * (depth - k * k * c));
    }
}

// sum[r][n] = a[r][:] . weights[:, n], for ROWS pixels and N vectors of outputs.
template <int N>
inline void multiply(const float* const* a, const float* weights, int depth, vec (&sum)[ROWS][N]) {
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = vec{};
    for (int k = 0; k < depth; ++k, weights += N * V) {
        vec weight[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) weight[n] = load(weights + n * V);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            vec value = splat(a[r][k]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] += value * weight[n];
        }
    }
}

#if defined(__AVX512BF16__)
template <int N>
inline void multiply(const bfloat16* const* a, const bfloat16* weights, int depth, vec (&sum)[ROWS][N]) {
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) sum[r][n] = vec{};
    for (int k = 0; k < depth; k += 2, weights += 2 * N * V) {
        __m512bh weight[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) weight[n] = (__m512bh)_mm512_loadu_si512(weights + 2 * n * V);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, a[r] + k, sizeof pair);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] = (vec)_mm512_dpbf16_ps((__m512)sum[r][n], value, weight[n]);
        }
    }
}
#endif

// What follows the product: x = max(sum + bias + residual, low), stored, or summed over the pixels.
struct Epilogue {
    const float* bias;     // [outputs]
    const void* residual;  // T [pixels][outputs], with ADD
    float low;             // 0 for ReLU, else -infinity
    void* out;             // [pixels][outputs]: T; float with WIDE; the sums [outputs] with SUM
    int outputs;
    const char *ahead, *ahead_end;  // what the next tile reads first: fetched meanwhile, where memory would idle
};
enum Mode { STORE, ADD, WIDE, SUM };

// The product of `pixels` rows of a [pixels][depth] with a panel of N vectors of weights, and what follows it.
template <class T, Mode MODE, int N>
void panel(const T* a, int depth, const T* weights, int pixels, int first, const Epilogue& then) {
    using Out = std::conditional_t<MODE == WIDE || MODE == SUM, float, T>;
    const vec low = splat(then.low);
    const long outputs = then.outputs;
    const long share = ((then.ahead_end - then.ahead) / pixels / LINE + 1) * LINE;
    vec bias[N], total[N] = {};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) bias[n] = load(then.bias + first + n * V);
    for (int p = 0; p < pixels; p += ROWS) {
        const int rows = std::min(ROWS, pixels - p);
        const T* at[ROWS];
        for (int r = 0; r < ROWS; ++r) at[r] = a + long(p + std::min(r, rows - 1)) * depth;
        vec sum[ROWS][N];
        if (first == 0)
            for (const char* line = then.ahead + p * share; line < std::min(then.ahead_end, then.ahead + (p + ROWS) * share); line += LINE)
                __builtin_prefetch(line, 0, 2);
        const T* residual = static_cast<const T*>(then.residual) + p * outputs + first;
        Out* out = static_cast<Out*>(then.out) + p * outputs + first;
        if (MODE == ADD)
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < N * V; i += LINE / int(sizeof(T))) __builtin_prefetch(residual + r * outputs + i);
        multiply<N>(at, weights, depth, sum);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            if (r == rows) break;
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                vec x = sum[r][n] + bias[n];
                if (MODE == ADD) x += load(residual + r * outputs + n * V);
                x = maximum(low, x);
                if (MODE == SUM) total[n] += x;
                else store(out + r * outputs + n * V, x);
            }
        }
    }
    if (MODE == SUM)
        for (int n = 0; n < N; ++n) {
            float* to = static_cast<float*>(then.out) + first + n * V;
            store(to, load(to) + total[n]);
        }
}

template <class T, Mode MODE>
void product(const T* a, int depth, const T* weights, int pixels, const Epilogue& then) {
    constexpr decltype(&panel<T, MODE, 1>) PANELS[] = {panel<T, MODE, 1>, panel<T, MODE, 2>,
                                                       panel<T, MODE, std::min(3, PANEL)>, panel<T, MODE, PANEL>};
    for (int first = 0; first < then.outputs;) {
        const int vectors = std::min(PANEL, (then.outputs - first) / V);
        PANELS[vectors - 1](a, depth, weights, pixels, first, then);
        weights += long(depth) * vectors * V;
        first += vectors * V;
    }
}

// Pixels begin..end, counted from the first row of `out`. With SUM their sum is added to `sums` [outputs] instead.
template <class T, Mode MODE>
void convolve_pixels(const Conv& conv, const Map& in, const Map& out, const T* residual, float low, float* sums,
                     long begin, long end) {
    const bool direct = !conv.depthwise && conv.kernel == 1 && conv.stride == 1;
    const int patch = conv.kernel * conv.kernel * in.c;
    const int depth = conv.depthwise || direct ? in.c : patch + patch % 2;
    const long size = MODE == WIDE ? sizeof(float) : sizeof(T);
    T* const tile = direct ? nullptr : reinterpret_cast<T*>(scratch(sizeof(T) * TILE * depth));
    for (; begin < end; begin += TILE) {
        const long stop = std::min(end, begin + TILE);
        const T* a = tile;
        if (direct) a = row_of<T>(in, out.first) + begin * in.c;
        T* fill = tile;
        for (long p = begin; !direct && p < stop;) {
            const int y = out.first + int(p / out.w), x0 = int(p % out.w);
            const int x1 = int(std::min(long(out.w), x0 + stop - p));
            if (conv.depthwise) depthwise<T>(conv, in, y, x0, x1, fill);
            else patches<T>(conv, in, y, x0, x1, depth, fill);
            fill += long(x1 - x0) * depth;
            p += x1 - x0;
        }
        void* to = MODE == SUM ? static_cast<void*>(sums) : static_cast<char*>(out.data) + begin * out.c * size;
        const char *ahead = nullptr, *ahead_end = nullptr;
        if (const int y = int(stop / out.w) * conv.stride + conv.kernel - 1 - conv.padding + out.first * conv.stride;
            !direct && stop < end && y < in.h) {
            const long x = stop % out.w * conv.stride;
            ahead = reinterpret_cast<const char*>(row_of<T>(in, y) + x * in.c);
            ahead_end = ahead + sizeof(T) * in.c * std::min(long(in.w) - x, long(TILE) * conv.stride);
        }
        const Epilogue then{conv.bias, residual + begin * out.c, low, to, out.c, ahead, ahead_end};
        product<T, MODE>(a, depth, static_cast<const T*>(conv.weights), int(stop - begin), then);
    }
}

// The convolution of a map: into the rows of `out`, or with SUM the sum over all pixels into sums [outputs]. The sums are
// added up in an order that does not depend on the number of threads, and so is every result.
template <class T, Mode MODE>
void convolve(const Conv& conv, const Map& in, const Map& out, const T* residual, float low, float* sums, int threads) {
    const long pixels = long(out.rows) * out.w;
    const long wanted = MODE == SUM ? SUMS : long(threads) * PARTS;
    const long part = (pixels / wanted / ROWS + 1) * ROWS;  // neighbours: they read the same rows
    const long parts = (pixels + part - 1) / part;
    std::vector<float> partial(MODE == SUM ? parts * out.c : 0, 0.0f);
    pool->run(parts, threads, [&](long task) {
        const long begin = task * part, end = std::min(pixels, begin + part);
        convolve_pixels<T, MODE>(conv, in, out, residual, low, partial.data() + task * (MODE == SUM ? out.c : 0), begin, end);
    });
    for (long i = 0; i < long(partial.size()); ++i) sums[i % out.c] += partial[i];
}

// ---- images, sums and resizings --------------------------------------------------------------------------------------------

inline void put(float* p, float x) { *p = x; }
#if defined(__AVX512BF16__)
inline void put(bfloat16* p, float x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_set1_ps(x));
    std::memcpy(p, &rounded, sizeof *p);
}
#endif

// An image [3][height][width], float or bytes, to (x - mean) / std [out.h][out.w][3], with zeros right and below.
// False where a value is not finite.
template <class T, class Pixel>
bool normalize(const Image& image, const Map& out, int threads) {
    std::atomic<bool> finite{true};
    pool->rows(out.h, threads, [&](long y) {
        T* to = static_cast<T*>(out.data) + y * out.w * 3;
        std::memset(to, 0, sizeof(T) * out.w * 3);
        if (y >= image.height) return;
        for (int channel = 0; channel < 3; ++channel) {
            const Pixel* from = static_cast<const Pixel*>(image.data) + channel * image.channel_step + y * image.row_step;
            const float mean = image.mean[channel], std = image.std[channel];
            float check = 0;
            for (int x = 0; x < image.width; ++x) {
                float value = from[x * image.column_step];
                check += value * 0;  // NaN from NaN and from infinity
                if (sizeof(Pixel) == 1) value /= 255;
                put(to + 3 * x + channel, (value - mean) / std);
            }
            if (check != 0) finite = false;
        }
    });
    return finite;
}

// Eq. 5 at a node: out = sum of weight * map over the arrivals, in one pass.
template <class T>
void assemble(const Arrival* arrivals, int count, const Map& out, bool relu, int threads) {
    const int c = out.c, w = out.w;
    const vec low = splat(relu ? 0.0f : -INFINITY);
    pool->rows(out.h, threads, [&](long y) {
        T* to = static_cast<T*>(out.data) + y * w * c;
        const T* full[3];
        float weight[3];
        int fulls = 0;
        float* row = nullptr;  // the arrival of half the size, resized in height: [w/2][c]
        for (int i = 0; i < count; ++i) {
            const T* from = static_cast<const T*>(arrivals[i].data);
            if (!arrivals[i].halved) {
                full[fulls] = from + y * w * c;
                weight[fulls++] = arrivals[i].weight;
                continue;
            }
            const long near = y / 2, far = std::clamp(near + (y % 2 ? 1L : -1L), 0L, long(out.h / 2 - 1));
            const T *a = from + near * (w / 2) * c, *b = from + far * (w / 2) * c;
            const vec wa = splat(0.75f * arrivals[i].weight), wb = splat(0.25f * arrivals[i].weight);
            row = reinterpret_cast<float*>(scratch(sizeof(float) * (w / 2) * c));
            for (int j = 0; j < w / 2 * c; j += V) store(row + j, wa * load(a + j) + wb * load(b + j));
        }
        for (int x = 0; x < w; ++x) {
            const float *near = nullptr, *far = nullptr;
            if (row) {
                near = row + x / 2 * c;
                far = row + std::clamp(x / 2 + (x % 2 ? 1 : -1), 0, w / 2 - 1) * c;
            }
            for (int i = x * c; i < (x + 1) * c; i += V) {
                vec sum = {};
                for (int j = 0; j < fulls; ++j) sum += splat(weight[j]) * load(full[j] + i);
                if (row) sum += splat(0.75f) * load(near + i - x * c) + splat(0.25f) * load(far + i - x * c);
                sum = maximum(low, sum);
                store(to + i, sum);
            }
        }
    });
}

// Where bilinear resizing by 1/step (corners not aligned) reads for an output index.
struct Between {
    int near, far;
    float weight;  // of far
    Between(int index, float step, int size) {
        float at = std::max(0.0f, (index + 0.5f) * step - 0.5f);
        near = std::min(int(at), size - 1);
        far = std::min(near + 1, size - 1);
        weight = at - near;
    }
};

// The small gate's view of a map: a quarter of the size, at least one pixel (`shrink` of model/gate.py).
template <class T>
void shrink(const Map& in, const Map& out, int threads) {
    const int c = in.c;
    const bool whole = std::min(in.h, in.w) >= SMALL_GATE_FACTOR;
    const float step_y = whole ? SMALL_GATE_FACTOR : float(in.h) / out.h;
    const float step_x = whole ? SMALL_GATE_FACTOR : float(in.w) / out.w;
    pool->run(out.h, threads, [&](long y) {
        const Between rows(int(y), step_y, in.h);
        const T *top = row_of<T>(in, rows.near), *bottom = row_of<T>(in, rows.far);
        T* to = static_cast<T*>(out.data) + y * out.w * c;
        for (int x = 0; x < out.w; ++x, to += c) {
            const Between columns(x, step_x, in.w);
            const vec lower = splat(rows.weight), upper = splat(1 - rows.weight);
            const vec right = splat(columns.weight), left = splat(1 - columns.weight);
            for (int i = 0; i < c; i += V) {
                const long a = long(columns.near) * c + i, b = long(columns.far) * c + i;
                store(to + i, upper * (left * load(top + a) + right * load(top + b)) +
                                  lower * (left * load(bottom + a) + right * load(bottom + b)));
            }
        }
    });
}

// Scores, float [h,w,c], to logits [classes][4h][4w], of which `height` x `width` are kept: bilinear, factor 4.
void enlarge(const Map& in, int classes, float* out, int height, int width, int threads) {
    const int w = in.w, c = in.c;
    large_pages(out, sizeof(float) * classes * height * width);
    const vec4 left = {0.375f, 0.125f, 0, 0}, right = {0, 0, 0.125f, 0.375f};
    const vec4 middle = {0.625f, 0.875f, 0.875f, 0.625f};
    pool->rows(height, threads, [&](long y) {
        const Between rows(int(y), 0.25f, in.h);
        const vec upper = splat(1 - rows.weight), lower = splat(rows.weight);
        const float *a = row_of<float>(in, rows.near), *b = row_of<float>(in, rows.far);
        float* line = reinterpret_cast<float*>(scratch(sizeof(float) * (long(w) * c + w + 2 + 4 * w)));
        float* plane = line + long(w) * c;  // one class, with a pixel more at each end
        float* resized = plane + w + 2;
        for (long j = 0; j < long(w) * c; j += V) store(line + j, upper * load(a + j) + lower * load(b + j));
        for (int k = 0; k < classes; ++k) {
            for (int x = 0; x < w; ++x) plane[x + 1] = line[long(x) * c + k];
            plane[0] = plane[1];
            plane[w + 1] = plane[w];
            float* to = out + (long(k) * height + y) * width;
            float* target = width == 4 * w ? to : resized;
            for (int x = 0; x < w; ++x)
                *reinterpret_cast<vec4*>(target + 4 * x) = left * plane[x] + middle * plane[x + 1] + right * plane[x + 2];
            if (target != to) std::memcpy(to, target, sizeof(float) * width);
        }
    });
}

}  // namespace
