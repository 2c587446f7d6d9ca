// A forward of the network on a CPU, for one image: closed paths and dropped cells are not computed.
//
// compiled.py describes the network in these structures and packs its weights; convolution.h and maps.h compute. Gates
// cost no pass over memory: activations are the weights of the sums that the next nodes read, and a path up is added
// where it arrives, at half the size. Compiled once for each instruction set (setup.py). Eq. and Sec. are of the paper.
//
// Legend: L depth, S scales; gates [L+1][S][3], directions up, keep, down.

#include "maps.h"

#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>

namespace {

constexpr int UP = 0, KEEP = 1, DOWN = 2, DIRECTIONS = 3;
constexpr int STEM_CONVOLUTIONS = 3;
constexpr int STEM_BAND = 8;  // rows of the stem's output computed at a time: what lies before them stays in the cache
constexpr float BELOW_ONE = 1 - 1.1920929e-7f;  // activations of gates are below 1

// One node; the network lacks it where it has no direction.
struct Node {
    int32_t operations, identity;     // of the cell: separable ones, each of two convolutions, and the input itself
    int32_t directions[DIRECTIONS];   // 1: the node has it
    int32_t gated, small_gate, features;
    const Conv* cell;                 // [operations][2]
    Conv transforms[DIRECTIONS];      // keep has none
    Conv squeeze;                     // of the gate: its outputs' means are the `features`
    const float *weight, *bias;       // of the gate: [3][features], [3]
};

struct Network {
    int32_t depth, scales, zeros_arrive, softmax, classes;
    const Conv* stem;    // [3]
    const Node* nodes;   // [L+1][S]
    const Conv* merges;  // of the decoder, [S]
    Conv predictor;
};

// What a forward is asked for. Raster sizes are those of the image; `padded` ones are multiples of the stride.
struct Request {
    Image image;
    int32_t padded_height, padded_width;
    const float* given;  // gates of a given route, or null
    int32_t own;         // a given route's open paths have the network's own activations
    float *gates, *logits;
    double* seconds;  // null, or [L+1][S][5] gather, gate, cell, up, down; then stem, decoder
    int32_t threads;
};

enum { GATHER, GATE, CELL, SEND_UP, SEND_DOWN, STEPS };

// Memory that forwards use one after another: fresh memory from the system costs as much as a pass over it. Whoever
// finds the lock taken does without, and so never waits: in a forked child it may stay taken for ever.
class Workspace {
  public:
    ~Workspace() { release(); }

    // Lets go of what images of another size have left.
    void expect(int height, int width) {
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (!guard.owns_lock() || (height == last_height && width == last_width)) return;
        last_height = height, last_width = width;
        release();
    }

    void* take(size_t bytes) {
        if (std::unique_lock<std::mutex> guard(lock, std::try_to_lock); guard.owns_lock()) {
            std::vector<void*>& blocks = spare[bytes];
            if (!blocks.empty()) {
                void* block = blocks.back();
                blocks.pop_back();
                return block;
            }
        }
        void* block = std::aligned_alloc(LINE, bytes);
        if (!block) throw std::bad_alloc();
        large_pages(block, bytes);
        return block;
    }

    void give(void* block, size_t bytes) {
        std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
        if (guard.owns_lock()) spare[bytes].push_back(block);
        else std::free(block);
    }

  private:
    void release() {
        for (auto& [size, blocks] : spare)
            for (void* block : blocks) std::free(block);
        spare.clear();
    }

    std::mutex lock;
    std::map<size_t, std::vector<void*>> spare;
    int last_height = 0, last_width = 0;
};

// Memory of the maps of one forward: first that of its logits, which are written last, then a workspace's.
class Arena {
  public:
    Arena(Workspace& workspace, void* begin, size_t bytes) : workspace(workspace) {
        large_pages(begin, bytes);
        next = whole_lines(reinterpret_cast<uintptr_t>(begin));
        end = reinterpret_cast<uintptr_t>(begin) + bytes;
    }
    ~Arena() {
        for (auto& [block, bytes] : borrowed) workspace.give(block, bytes);
    }

    std::shared_ptr<void> take(size_t bytes, bool beside_logits) {
        bytes = whole_lines(bytes);
        auto free = beside_logits ? spare.end() : spare.lower_bound(bytes);
        if (free != spare.end() && free->first <= 2 * bytes) {  // the smallest that is large enough
            const auto [size, block] = *free;
            spare.erase(free);
            return held(block, size);
        }
        if (beside_logits || next + bytes > end) {
            borrowed.push_back({workspace.take(bytes), bytes});
            return held(borrowed.back().first, bytes);
        }
        next += bytes;
        return held(reinterpret_cast<void*>(next - bytes), bytes);
    }

  private:
    static uintptr_t whole_lines(uintptr_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

    std::shared_ptr<void> held(void* block, size_t bytes) {
        return {block, [this, bytes](void* unused) { spare.emplace(bytes, unused); }};
    }

    Workspace& workspace;
    uintptr_t next, end;
    std::multimap<size_t, void*> spare;
    std::vector<std::pair<void*, size_t>> borrowed;
};

// A map and its memory.
struct Held {
    Map map{};
    std::shared_ptr<void> memory;
};

// What arrives at a node along one edge (Eq. 5): weight times the map; of half the size, along a path up.
struct Arriving {
    Held from;
    float weight;
    bool halved;
};
using Arrivals = std::vector<std::vector<Arriving>>;  // by scale

class Clock {
  public:
    explicit Clock(double* seconds) : seconds(seconds), start(Now::now()) {}
    void lap(long place) {
        if (!seconds) return;
        const Now::time_point now = Now::now();
        seconds[place] += std::chrono::duration<double>(now - start).count();
        start = now;
    }

  private:
    using Now = std::chrono::steady_clock;
    double* seconds;
    Now::time_point start;
};

template <class T>
class Forward {
  public:
    Forward(const Network& net, const Request& request, Workspace& workspace)
        : net(net), request(request), workspace(workspace),
          arena(workspace, request.logits, sizeof(float) * net.classes * request.image.height * request.image.width),
          threads(request.threads), clock(request.seconds) {}

    // False where the image has values that are not finite.
    bool run() {
        const int scales = net.scales;
        if (!stem()) return false;
        const long steps = long(net.depth + 1) * scales * STEPS;
        clock.lap(steps);
        Arrivals arrivals(scales);
        arrivals[0].push_back({stem_map, 1, false});
        std::vector<char> reached(scales, false);
        reached[0] = true;
        for (int layer = 0; layer <= net.depth; ++layer) {
            Arrivals next(scales);
            std::vector<char> next_reached(scales, false);
            std::vector<Held> features(scales);
            for (int scale = 0; scale < scales; ++scale) {  // sums are smaller than what arrives: all of them first
                if (!reached[scale]) continue;
                features[scale] = gathered(arrivals[scale], scale, channels(scale));
                arrivals[scale].clear();
                clock.lap((long(layer) * scales + scale) * STEPS + GATHER);
            }
            for (int scale = 0; scale < scales; ++scale) {
                float* alpha = request.gates + (layer * scales + scale) * DIRECTIONS;
                std::fill(alpha, alpha + DIRECTIONS, 0.0f);
                if (reached[scale]) visit(layer, scale, std::move(features[scale]), alpha, next, next_reached);
            }
            arrivals = std::move(next);
            reached = next_reached;
        }
        decode(arrivals);
        clock.lap(steps + 1);
        return true;
    }

  private:
    Held make(int h, int w, int c, int first, int rows, bool wide = false) {
        const size_t bytes = (wide ? sizeof(float) : sizeof(T)) * rows * w * c;
        Held held{{nullptr, h, w, c, first, rows}, arena.take(bytes, wide)};  // only the scores are wide
        held.map.data = held.memory.get();
        return held;
    }

    static int after(const Conv& conv, int side) { return (side + 2 * conv.padding - conv.kernel) / conv.stride + 1; }

    void convolve_into(const Conv& conv, const Map& x, const Map& out, const Map* residual, bool relu) {
        const T* added = residual ? static_cast<const T*>(residual->data) : nullptr;
        const float low = relu ? 0.0f : -INFINITY;
        auto go = conv.wide ? convolve<T, WIDE> : residual ? convolve<T, ADD> : convolve<T, STORE>;
        go(conv, x, out, added, low, nullptr, threads);
    }

    Held convolved(const Conv& conv, const Map& x, const Map* residual = nullptr, bool relu = true) {
        const int h = after(conv, x.h);
        Held out = make(h, after(conv, x.w), conv.outputs, 0, h, conv.wide);
        convolve_into(conv, x, out.map, residual, relu);
        return out;
    }

    bool stem() {
        const int height = request.padded_height, width = request.padded_width;
        workspace.expect(height, width);
        Held image = make(height, width, 3, 0, height);
        const bool finite = request.image.bytes ? normalize<T, uint8_t>(request.image, image.map, threads)
                                                : normalize<T, float>(request.image, image.map, threads);
        if (!finite) return false;
        Map shape[STEM_CONVOLUTIONS + 1] = {image.map};  // of the image, and behind each convolution
        for (int i = 0; i < STEM_CONVOLUTIONS; ++i) {
            const int h = after(net.stem[i], shape[i].h);
            shape[i + 1] = {nullptr, h, after(net.stem[i], shape[i].w), net.stem[i].outputs, 0, h};
        }
        const Map& last = shape[STEM_CONVOLUTIONS];
        stem_map = make(last.h, last.w, last.c, 0, last.h);
        for (int begin = 0; begin < last.h; begin += STEM_BAND) {
            int first[STEM_CONVOLUTIONS + 1], end[STEM_CONVOLUTIONS + 1];  // rows that this band needs
            first[STEM_CONVOLUTIONS] = begin;
            end[STEM_CONVOLUTIONS] = std::min(begin + STEM_BAND, last.h);
            for (int i = STEM_CONVOLUTIONS - 1; i > 0; --i) {
                const Conv& conv = net.stem[i];
                first[i] = std::max(0, first[i + 1] * conv.stride - conv.padding);
                end[i] = std::min(shape[i].h, (end[i + 1] - 1) * conv.stride - conv.padding + conv.kernel);
            }
            Held x = image;
            for (int i = 1; i < STEM_CONVOLUTIONS; ++i) {
                Held band = make(shape[i].h, shape[i].w, shape[i].c, first[i], end[i] - first[i]);
                convolve_into(net.stem[i - 1], x.map, band.map, nullptr, true);
                x = band;
            }
            Map rows = stem_map.map;
            rows.first = begin;
            rows.rows = end[STEM_CONVOLUTIONS] - begin;
            rows.data = static_cast<T*>(rows.data) + long(begin) * rows.w * rows.c;
            convolve_into(net.stem[STEM_CONVOLUTIONS - 1], x.map, rows, nullptr, true);
        }
        return true;
    }

    // Eq. 5 at a node: the weighted sum of what arrives; zeros where nothing does.
    Held gathered(const std::vector<Arriving>& arrivals, int scale, int channels, bool relu = false) {
        if (arrivals.size() == 1 && arrivals[0].weight == 1 && !arrivals[0].halved && !relu) return arrivals[0].from;
        const int h = stem_map.map.h >> scale, w = stem_map.map.w >> scale;
        Held out = make(h, w, channels, 0, h);
        if (arrivals.empty()) {
            std::memset(out.map.data, 0, sizeof(T) * h * w * channels);
            return out;
        }
        Arrival all[DIRECTIONS + 1];
        for (size_t i = 0; i < arrivals.size(); ++i)
            all[i] = {arrivals[i].from.map.data, arrivals[i].weight, arrivals[i].halved};
        assemble<T>(all, int(arrivals.size()), out.map, relu, threads);
        return out;
    }

    // A node that something arrives at: its gate, its cell, and what it sends to the next layer.
    void visit(int layer, int scale, Held x, float* alpha, Arrivals& next, std::vector<char>& next_reached) {
        const Node& node = net.nodes[layer * net.scales + scale];
        const long place = (long(layer) * net.scales + scale) * STEPS;
        const long edges = (long(layer) * net.scales + scale) * DIRECTIONS;
        activations(node, x.map, request.given ? request.given + edges : nullptr, alpha);
        clock.lap(place + GATE);
        if (!(alpha[UP] > 0 || alpha[KEEP] > 0 || alpha[DOWN] > 0)) {  // dropped cell: the input is kept, for free
            next[scale].push_back({x, 1, false});
            next_reached[scale] = true;
            return;
        }
        const Held hidden = cell(node, x, scale);
        x = {};
        clock.lap(place + CELL);
        for (int direction = UP; direction <= DOWN; ++direction) {
            const int target = scale + direction - KEEP;
            if (alpha[direction] > 0) {
                const bool same = direction == KEEP;
                next[target].push_back({same ? hidden : convolved(node.transforms[direction], hidden.map),
                                        alpha[direction], direction == UP});
                if (!same) clock.lap(place + (direction == UP ? SEND_UP : SEND_DOWN));
            }
            if (alpha[direction] > 0 || (net.zeros_arrive && node.directions[direction])) next_reached[target] = true;
        }
    }

    int channels(int scale) const { return net.merges[scale].inputs; }

    // Eq. 2-4, times a given route.
    void activations(const Node& node, const Map& x, const float* given, float* alpha) {
        for (int d = 0; d < DIRECTIONS; ++d) alpha[d] = float(node.directions[d]);
        if (node.gated && (!given || request.own)) gate(node, x, alpha);
        for (int d = 0; given && d < DIRECTIONS; ++d) alpha[d] *= given[d];
    }

    void gate(const Node& node, const Map& x, float* alpha) {
        Held small;
        const Map* seen = &x;
        if (node.small_gate) {
            const int h = std::max(1, x.h / SMALL_GATE_FACTOR), w = std::max(1, x.w / SMALL_GATE_FACTOR);
            small = make(h, w, x.c, 0, h);
            shrink<T>(x, small.map, threads);
            seen = &small.map;
        }
        std::vector<float> sums(node.squeeze.outputs, 0.0f);
        const Map nothing{nullptr, seen->h, seen->w, node.squeeze.outputs, 0, seen->h};
        convolve<T, SUM>(node.squeeze, *seen, nothing, nullptr, 0.0f, sums.data(), threads);
        const float pixels = float(seen->h) * seen->w;
        float score[DIRECTIONS];
        for (int d = 0; d < DIRECTIONS; ++d) {
            score[d] = node.bias[d];
            for (int i = 0; i < node.features; ++i) score[d] += node.weight[d * node.features + i] * (sums[i] / pixels);
        }
        if (net.softmax) winner(node, score, alpha);
        for (int d = 0; !net.softmax && d < DIRECTIONS; ++d)
            if (node.directions[d]) alpha[d] = std::min(std::max(std::tanh(score[d]), 0.0f), BELOW_ONE);
    }

    // The alternative to Eq. 4: softmax over the directions, of which only the first largest stays.
    static void winner(const Node& node, const float* score, float* alpha) {
        int best = -1;
        float total = 0;
        for (int d = 0; d < DIRECTIONS; ++d)
            if (node.directions[d] && (best < 0 || score[d] > score[best])) best = d;
        for (int d = 0; d < DIRECTIONS; ++d) {
            if (node.directions[d]) total += std::exp(score[d] - score[best]);
            alpha[d] = 0;
        }
        alpha[best] = std::min(1 / total, BELOW_ONE);
    }

    // ReLU of H of Eq. 1: all transforms read it through a ReLU.
    Held cell(const Node& node, const Held& x, int scale) {
        if (!node.operations) return gathered({{x, 1, false}}, scale, x.map.c, true);
        Held total = node.identity ? x : Held{};
        for (int i = 0; i < node.operations; ++i) {
            const Held middle = convolved(node.cell[2 * i], x.map);
            const bool last = i == node.operations - 1;
            total = convolved(node.cell[2 * i + 1], middle.map, total.memory ? &total.map : nullptr, last);
        }
        return total;
    }

    void decode(Arrivals& arrivals) {
        std::vector<Arriving> running;
        for (int scale = net.scales - 1; scale >= 0; --scale) {
            std::vector<Arriving> incoming = arrivals[scale];
            incoming.insert(incoming.end(), running.begin(), running.end());
            const Held x = gathered(incoming, scale, channels(scale));
            arrivals[scale].clear();
            incoming.clear();
            running.clear();
            running = {{convolved(net.merges[scale], x.map), 1, true}};
        }
        const Held scores = convolved(net.predictor, running[0].from.map, nullptr, false);
        stem_map = {};
        enlarge(scores.map, net.classes, request.logits, request.image.height, request.image.width, threads);
    }

    const Network& net;
    const Request& request;
    Workspace& workspace;
    Arena arena;
    const int threads;
    Clock clock;
    Held stem_map;
};

template <class T>
int forward(const Network* net, const Request* request, void* workspace) {
    try {
        return Forward<T>(*net, *request, *static_cast<Workspace*>(workspace)).run() ? 0 : 1;
    } catch (...) {  // nothing else is thrown than for lack of memory
        return 2;
    }
}

}  // namespace

extern "C" {

// The best build for this machine, as its place in BUILDS of compiled.py. Ask the generic one: the others may not run.
int routeseg_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

// Whether the caller has these structures, as far as their sizes say it.
int routeseg_fits(int conv, int image, int node, int network, int request) {
    return conv == sizeof(Conv) && image == sizeof(Image) && node == sizeof(Node) && network == sizeof(Network) &&
           request == sizeof(Request);
}

int routeseg_vector() { return V; }
int routeseg_panel() { return PANEL * V; }

void* routeseg_open() { return new Workspace; }
void routeseg_close(void* workspace) { delete static_cast<Workspace*>(workspace); }

// 0: done; 1: the image has values that are not finite; 2: out of memory.
int routeseg_forward_float32(const Network* net, const Request* request, void* workspace) {
    return forward<float>(net, request, workspace);
}
#if defined(__AVX512BF16__)
int routeseg_forward_bfloat16(const Network* net, const Request* request, void* workspace) {
    return forward<bfloat16>(net, request, workspace);
}
#endif
}
