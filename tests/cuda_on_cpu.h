// Runs one kernel in CUDA C on the CPU: a block's threads are threads, blocks come one after the other.
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__ inline
#define __shared__ static

struct Place { unsigned x, y, z; };
thread_local Place threadIdx, blockIdx;
using Barrier = std::barrier<>;
std::unique_ptr<Barrier> block;
std::vector<std::unique_ptr<Barrier>> warps;
float lanes[32][32];

inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline void __syncthreads() { block->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float x, int step) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    lanes[warp][lane] = x;
    warps[warp]->arrive_and_wait();
    x = lanes[warp][lane ^ step];
    warps[warp]->arrive_and_wait();
    return x;
}

template <class... A, std::size_t... I>
void called(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
}

template <class... A>
void run(void (*kernel)(A...), const unsigned *grid, unsigned threads, void **arguments) {
    block = std::make_unique<Barrier>(threads);
    warps.clear();
    for (unsigned n = 0; n < threads / 32; n++) warps.push_back(std::make_unique<Barrier>(32));
    Barrier next(threads);
    std::vector<std::thread> running;
    for (unsigned n = 0; n < threads; n++)
        running.emplace_back([=, &next] {
            threadIdx = {n, 0, 0};
            for (unsigned z = 0; z < grid[2]; z++)
                for (unsigned y = 0; y < grid[1]; y++)
                    for (unsigned x = 0; x < grid[0]; x++) {
                        blockIdx = {x, y, z};
                        called(kernel, arguments, std::index_sequence_for<A...>());
                        next.arrive_and_wait();
                    }
        });
    for (auto &thread : running) thread.join();
}
