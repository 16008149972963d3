// The normalization of a ResNet basic block in inference, on a thread pool of one's own:
//
//     y = relu(bn1(conv1(x)));  out = relu(bn2(conv2(y)) + x)
//
// The convolutions are the identity here, so that the result can be checked.
#include <fastnorm.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

// Workers that wait between jobs. A job is a function of an index.
class Pool {
public:
    explicit Pool(int size)
    {
        for (int worker = 0; worker < size; worker++) workers_.emplace_back([this] { serve(); });
    }

    ~Pool()
    {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    void run(int64_t n, std::function<void(int64_t)> body)
    {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = std::move(body);
            next_ = 0;
            n_ = n;
            busy_ = static_cast<int>(workers_.size());
            turn_++;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

    // fastnorm_options.parallel_for
    static void parallel_for(void *user, int64_t n, void (*body)(void *, int64_t), void *context)
    {
        static_cast<Pool *>(user)->run(n, [=](int64_t index) { body(context, index); });
    }

private:
    void work()
    {
        for (int64_t index; (index = next_++) < n_;) body_(index);
    }

    void serve()
    {
        for (int64_t seen = 0;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || turn_ != seen; });
                if (stop_) return;
                seen = turn_;
            }
            work();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::function<void(int64_t)> body_;
    std::atomic<int64_t> next_{0};
    int64_t n_ = 0, turn_ = 0;
    int busy_ = 0;
    bool stop_ = false;
};

// Running statistics and parameters of one batch norm.
struct BatchNorm {
    std::vector<float> mean, var, weight, bias;

    BatchNorm(int channels, float at)
    {
        for (int c = 0; c < channels; c++) {
            mean.push_back(at + 0.01f * c);
            var.push_back(1 + 0.1f * c);
            weight.push_back(1 - 0.02f * c);
            bias.push_back(0.05f * c - 1);
        }
    }

    // out = relu(bn(x) + residual), residual may be null.
    fastnorm_status operator()(int64_t n, int64_t spatial, const float *x, const float *residual,
                               float *out, const fastnorm_options &options)
    {
        const fastnorm_geometry nchw = {1, n, static_cast<int64_t>(mean.size()), 1, spatial, 1};
        fastnorm_forward_args args = {};
        args.struct_size = sizeof args;
        args.dtype = FASTNORM_FLOAT32;
        args.flags = FASTNORM_GIVEN_STATISTICS;
        args.activation = FASTNORM_RELU;
        args.eps = 1e-5;
        args.x = x;
        args.residual = residual;
        args.y = out;
        args.weight = weight.data();
        args.bias = bias.data();
        args.running_mean = mean.data();
        args.running_var = var.data();
        return fastnorm_forward(&nchw, &args, &options);
    }

    float of(float x, int c) const
    {
        return (x - mean[c]) / std::sqrt(var[c] + 1e-5f) * weight[c] + bias[c];
    }
};

int main()
{
    const int n = 4, channels = 32, spatial = 56 * 56, size = n * channels * spatial;
    std::vector<float> x(size), y(size), out(size);
    for (int at = 0; at < size; at++) x[at] = static_cast<float>(at * 7919L % 1000) / 250 - 2;
    BatchNorm bn1(channels, 0.1f), bn2(channels, 0.3f);
    Pool pool(2);
    fastnorm_options options = {};
    options.struct_size = sizeof options;
    options.num_threads = 3;
    options.parallel_for = Pool::parallel_for;
    options.parallel_for_user = &pool;

    fastnorm_status status = bn1(n, spatial, x.data(), nullptr, y.data(), options);
    if (status == FASTNORM_OK) status = bn2(n, spatial, y.data(), x.data(), out.data(), options);
    if (status != FASTNORM_OK) {
        std::fprintf(stderr, "%s\n", fastnorm_status_string(status));
        return EXIT_FAILURE;
    }
    double worst = 0;
    for (int at = 0; at < size; at++) {
        const int c = at / spatial % channels;
        const float before = bn2.of(std::fmax(bn1.of(x[at], c), 0.0f), c) + x[at];
        worst = std::fmax(worst, std::fabs(out[at] - std::fmax(before, 0.0f)));
    }
    std::printf("resnet block: off by at most %.1e\n", worst);
    return worst < 1e-4 ? EXIT_SUCCESS : EXIT_FAILURE;
}
