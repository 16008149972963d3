"""The CUDA kernels: sums of a part, their merge, and the map, in the two loop orders; and rows with
a weight for each place, a block a row.

An array is x[b, o, c, i] with c = g*k channels, as in geometry.py. In the order of rows (i > 1, or
o == 1) the values of one channel of one sample are o runs of i values; in the order of columns
(i == 1) they lie down a column. Every channel of a sample is cut into `parts`, the same for a
geometry, and partial results are merged in their order: no atomics, the same bits every time.

Moments are Welford's, merged by Chan's formula, of the differences from the first value of the
set: a variance is taken about the mean, and neither squares nor a mean far from zero cost digits.
`values`, `mean`, ... are small local arrays, one place for each lane of a vector access; the
compiler keeps them in registers.

Bytes moved: forward 2 reads of x and 1 write, backward 2 reads of x and dy and 1 write; where the
second read comes from the second-level cache, it costs no memory traffic, and rows with a weight
for each place are short enough for that. Maps go through their blocks backwards, to what was read
last.
"""

from functools import cache
from math import sqrt
from types import SimpleNamespace

from numba import config, cuda, int64

from fastnorm.backends import cuda_words

if config.ENABLE_CUDASIM:
    from fastnorm.backends import cuda_simulated as words_of
else:
    words_of = cuda_words

THREADS = words_of.THREADS
ACROSS = words_of.WARP  # threads of a block side by side in the order of columns
DOWN = THREADS // ACROSS
COEFFICIENTS = 4  # hi, scale, shift and dscale of a channel, one behind the other


@cache
def kernels(storage, parameter, wide):
    """The kernels for a storage type and a type of weight and bias; `wide` for vector accesses, to
    arrays that are aligned to 16 bytes and whose runs (rows, in the order of columns) are whole
    vectors."""
    x_words = words_of.words(storage, wide)
    p_words = words_of.words(parameter)
    work = x_words.work
    w_words = words_of.words(str(work))
    merge, block_sums, block_moments = words_of.block_words(work)
    lanes = x_words.lanes
    load, load_lanes, store_lanes = x_words.load, x_words.load_lanes, x_words.store_lanes
    load_parameter, store_parameter = p_words.load, p_words.store
    load_work, store_work = w_words.load, w_words.store

    @cuda.jit(device=True)
    def parameter_or(address, index, otherwise):
        if address == 0:
            return otherwise
        return load_parameter(address, index)

    @cuda.jit(device=True)
    def rstd_of(var, eps):
        return work(1) / sqrt(var + eps)

    @cuda.jit(device=True)
    def merged_lanes(count, mean, m2):
        n = count
        m = mean[0]
        q = m2[0]
        for v in range(1, lanes):
            n, m, q = merge(n, m, q, count, mean[v], m2[v])
        return n, m, q

    @cuda.jit(device=True)
    def welford(values, about, mean, m2, inverse):
        for v in range(lanes):
            value = values[v] - about
            d = value - mean[v]
            mean[v] += d * inverse
            m2[v] += d * (value - mean[v])

    # ---- sums of a part: a channel of a sample, in the order of rows ----------------------

    @cuda.jit
    def row_moments(x, partial, o, channels, g, i, parts, length):
        """partial[channel, part] = count, mean, m2; a part is `length` vectors."""
        values = cuda.local.array(lanes, work)
        mean = cuda.local.array(lanes, work)
        m2 = cuda.local.array(lanes, work)
        for v in range(lanes):
            mean[v] = work(0)
            m2[v] = work(0)
        channel = int64(cuda.blockIdx.x) // parts
        base = (channel // channels * o * channels + channel % channels) * i
        about = load(x, base - channel % channels % (channels // g) * i)
        in_run = i // lanes
        at = int64(cuda.blockIdx.x) % parts * length + cuda.threadIdx.x
        end = min(o * in_run, (int64(cuda.blockIdx.x) % parts + 1) * length)
        run = at // in_run
        place = at % in_run
        count = work(0)
        while at < end:
            load_lanes(x, base + run * channels * i + place * lanes, values)
            count += work(1)
            welford(values, about, mean, m2, work(1) / count)
            at += THREADS
            run += THREADS // in_run
            place += THREADS % in_run
            if place >= in_run:
                place -= in_run
                run += 1
        n, m, q = merged_lanes(count, mean, m2)
        n, m, q = block_moments(n, m, q)
        if cuda.threadIdx.x == 0:
            store_work(partial, 3 * int64(cuda.blockIdx.x), n)
            store_work(partial, 3 * int64(cuda.blockIdx.x) + 1, m)
            store_work(partial, 3 * int64(cuda.blockIdx.x) + 2, q)

    @cuda.jit
    def row_products(x, dy, partial, mean, o, channels, g, i, parts, length):
        """partial[channel, part] = sums of dy and of dy*(x - mean)."""
        values = cuda.local.array(lanes, work)
        slopes = cuda.local.array(lanes, work)
        channel = int64(cuda.blockIdx.x) // parts
        about = load_work(mean, channel // (channels // g))
        base = (channel // channels * o * channels + channel % channels) * i
        in_run = i // lanes
        at = int64(cuda.blockIdx.x) % parts * length + cuda.threadIdx.x
        end = min(o * in_run, (int64(cuda.blockIdx.x) % parts + 1) * length)
        run = at // in_run
        place = at % in_run
        s = work(0)
        p = work(0)
        while at < end:
            load_lanes(x, base + run * channels * i + place * lanes, values)
            load_lanes(dy, base + run * channels * i + place * lanes, slopes)
            for v in range(lanes):
                s += slopes[v]
                p += slopes[v] * (values[v] - about)
            at += THREADS
            run += THREADS // in_run
            place += THREADS % in_run
            if place >= in_run:
                place -= in_run
                run += 1
        s, p = block_sums(s, p)
        if cuda.threadIdx.x == 0:
            store_work(partial, 2 * int64(cuda.blockIdx.x), s)
            store_work(partial, 2 * int64(cuda.blockIdx.x) + 1, p)

    # ---- and in the order of columns: each thread goes down `lanes` of them ---------------

    @cuda.jit
    def column_moments(x, partial, o, channels, g, chunks, parts, length):
        """partial[channel, part] = count, mean, m2; a part is every DOWN-th of `length` rows."""
        values = cuda.local.array(lanes, work)
        about = cuda.local.array(lanes, work)
        mean = cuda.local.array(lanes, work)
        m2 = cuda.local.array(lanes, work)
        for v in range(lanes):
            mean[v] = work(0)
            m2[v] = work(0)
        tiles = parts // DOWN
        chunk = int64(cuda.blockIdx.x) % chunks
        tile = int64(cuda.blockIdx.x) // chunks % tiles
        b = int64(cuda.blockIdx.x) // chunks // tiles
        down = cuda.threadIdx.x // ACROSS
        column = (chunk * ACROSS + cuda.threadIdx.x % ACROSS) * lanes
        if column < channels:
            k = channels // g
            for v in range(lanes):
                about[v] = load(x, b * o * channels + (column + v) // k * k)
            count = work(0)
            row = tile * length + down
            end = min(o, (tile + 1) * length)
            while row < end:
                load_lanes(x, (b * o + row) * channels + column, values)
                for v in range(lanes):
                    values[v] -= about[v]
                count += work(1)
                welford(values, work(0), mean, m2, work(1) / count)
                row += DOWN
            for v in range(lanes):
                at = 3 * ((b * channels + column + v) * parts + tile * DOWN + down)
                store_work(partial, at, count)
                store_work(partial, at + 1, mean[v])
                store_work(partial, at + 2, m2[v])

    @cuda.jit
    def column_products(x, dy, partial, mean, rstd, o, channels, g, chunks, parts, length):
        """partial[channel, part] = sums of dy and of dy*(x - mean), or where there is an rstd, of
        rows that are sets of their own, of dy*(x - mean)*rstd."""
        values = cuda.local.array(lanes, work)
        slopes = cuda.local.array(lanes, work)
        s = cuda.local.array(lanes, work)
        p = cuda.local.array(lanes, work)
        for v in range(lanes):
            s[v] = work(0)
            p[v] = work(0)
        tiles = parts // DOWN
        chunk = int64(cuda.blockIdx.x) % chunks
        tile = int64(cuda.blockIdx.x) // chunks % tiles
        b = int64(cuda.blockIdx.x) // chunks // tiles
        down = cuda.threadIdx.x // ACROSS
        column = (chunk * ACROSS + cuda.threadIdx.x % ACROSS) * lanes
        if column < channels:
            row = tile * length + down
            end = min(o, (tile + 1) * length)
            while row < end:
                load_lanes(x, (b * o + row) * channels + column, values)
                load_lanes(dy, (b * o + row) * channels + column, slopes)
                for v in range(lanes):
                    set_ = (column + v) // (channels // g)
                    if rstd == 0:
                        d = values[v] - load_work(mean, b * g + set_)
                    else:
                        d = ((values[v] - load_work(mean, row * g + set_))
                             * load_work(rstd, row * g + set_))
                    s[v] += slopes[v]
                    p[v] += slopes[v] * d
                row += DOWN
            for v in range(lanes):
                at = 2 * ((b * channels + column + v) * parts + tile * DOWN + down)
                store_work(partial, at, s[v])
                store_work(partial, at + 1, p[v])

    # ---- a block a set: from the parts to what the map needs --------------------------------

    @cuda.jit
    def finish_forward(x, partial, weight, bias, running_mean, running_var, coefficients, mean_out,
                       var_out, rstd_out, o, g, k, i, parts, has_mean, given, eps):
        """Statistics from the parts of a set, and the map's coefficients of its channels. The mean
        is hi + lo, hi its rounding, so that subtracting it from an x near it loses nothing."""
        set_ = int64(cuda.blockIdx.x)
        mean = work(0)
        lo = work(0)
        var = work(0)
        if given != 0:
            mean = load_parameter(running_mean, set_)
            var = load_parameter(running_var, set_)
        else:
            n = work(0)
            m = work(0)
            q = work(0)
            at = int64(cuda.threadIdx.x)
            while at < k * parts:
                entry = 3 * (set_ * k * parts + at)
                n, m, q = merge(n, m, q, load_work(partial, entry), load_work(partial, entry + 1),
                                load_work(partial, entry + 2))
                at += THREADS
            n, m, q = block_moments(n, m, q)
            about = load(x, (set_ // g * o * g + set_ % g) * k * i)
            var = q / n
            mean = about + m
            lo = (about - mean) + m
            if has_mean == 0:
                var += mean * mean
                mean = work(0)
                lo = work(0)
        rstd = rstd_of(var, eps)
        if cuda.threadIdx.x == 0:
            store_work(mean_out, set_, mean)
            store_work(var_out, set_, var)
            store_work(rstd_out, set_, rstd)
        at = int64(cuda.threadIdx.x)
        while at < k:
            channel = set_ % g * k + at
            scale = rstd * parameter_or(weight, channel, work(1))
            into = COEFFICIENTS * (set_ * k + at)
            store_work(coefficients, into, mean)
            store_work(coefficients, into + 1, scale)
            store_work(coefficients, into + 2, parameter_or(bias, channel, work(0)) - lo * scale)
            at += THREADS

    @cuda.jit
    def finish_backward(partial, weight, coefficients, mean, rstd, g, k, parts, has_mean, given,
                        count):
        set_ = int64(cuda.blockIdx.x)
        gy = work(0)
        gyd = work(0)
        at = int64(cuda.threadIdx.x)
        while at < k * parts:
            w = parameter_or(weight, set_ % g * k + at // parts, work(1))
            entry = 2 * (set_ * k * parts + at)
            gy += w * load_work(partial, entry)
            gyd += w * load_work(partial, entry + 1)
            at += THREADS
        gy, gyd = block_sums(gy, gyd)
        r = load_work(rstd, set_)
        scale = -r * r * (r * gyd / count)
        shift = -r * (gy / count)
        if given != 0:
            scale = work(0)
        if has_mean == 0 or given != 0:
            shift = work(0)
        at = int64(cuda.threadIdx.x)
        while at < k:
            into = COEFFICIENTS * (set_ * k + at)
            store_work(coefficients, into, load_work(mean, set_))
            store_work(coefficients, into + 1, scale)
            store_work(coefficients, into + 2, shift)
            store_work(coefficients, into + 3,
                       r * parameter_or(weight, set_ % g * k + at, work(1)))
            at += THREADS

    @cuda.jit
    def finish_parameters(partial, rstd, dweight, dbias, b, g, k, parts):
        """dweight and dbias of a channel from its parts in all samples."""
        channel = int64(cuda.blockIdx.x)
        s = work(0)
        p = work(0)
        at = int64(cuda.threadIdx.x)
        while at < b * parts:
            entry = 2 * ((at // parts * g * k + channel) * parts + at % parts)
            s += load_work(partial, entry)
            if rstd == 0:
                p += load_work(partial, entry + 1)
            else:
                p += load_work(partial, entry + 1) * load_work(rstd, at // parts * g + channel // k)
            at += THREADS
        s, p = block_sums(s, p)
        if cuda.threadIdx.x == 0:
            if dweight != 0:
                store_parameter(dweight, channel, p)
            if dbias != 0:
                store_parameter(dbias, channel, s)

    @cuda.jit
    def move_running(running, found, b, g, scale, momentum):
        """running = (1 - momentum)*running + momentum*scale*(mean of found over b)."""
        at = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if at < g:
            total = work(0)
            for sample in range(b):
                total += load_work(found, sample * g + at)
            batch = total / work(b) * scale
            before = load_parameter(running, at)
            store_parameter(running, at, before + momentum * (batch - before))

    # ---- the map ----------------------------------------------------------------------------

    @cuda.jit
    def map_rows(x, dy, y, coefficients, o, channels, i, parts, length):
        """y = (x - hi)*scale + shift, plus dy*dscale where there is a dy."""
        values = cuda.local.array(lanes, work)
        slopes = cuda.local.array(lanes, work)
        block = int64(cuda.gridDim.x) - 1 - cuda.blockIdx.x
        channel = block // parts
        base = (channel // channels * o * channels + channel % channels) * i
        hi = load_work(coefficients, COEFFICIENTS * channel)
        scale = load_work(coefficients, COEFFICIENTS * channel + 1)
        shift = load_work(coefficients, COEFFICIENTS * channel + 2)
        dscale = work(0)
        if dy != 0:
            dscale = load_work(coefficients, COEFFICIENTS * channel + 3)
        in_run = i // lanes
        at = block % parts * length + cuda.threadIdx.x
        end = min(o * in_run, (block % parts + 1) * length)
        run = at // in_run
        place = at % in_run
        while at < end:
            here = base + run * channels * i + place * lanes
            load_lanes(x, here, values)
            for v in range(lanes):
                values[v] = (values[v] - hi) * scale + shift
            if dy != 0:
                load_lanes(dy, here, slopes)
                for v in range(lanes):
                    values[v] += slopes[v] * dscale
            store_lanes(y, here, values)
            at += THREADS
            run += THREADS // in_run
            place += THREADS % in_run
            if place >= in_run:
                place -= in_run
                run += 1

    @cuda.jit
    def map_columns(x, dy, y, coefficients, o, channels, chunks, tiles, length):
        values = cuda.local.array(lanes, work)
        slopes = cuda.local.array(lanes, work)
        hi = cuda.local.array(lanes, work)
        scale = cuda.local.array(lanes, work)
        shift = cuda.local.array(lanes, work)
        dscale = cuda.local.array(lanes, work)
        block = int64(cuda.gridDim.x) - 1 - cuda.blockIdx.x
        tile = block // chunks % tiles
        b = block // chunks // tiles
        column = (block % chunks * ACROSS + cuda.threadIdx.x % ACROSS) * lanes
        if column < channels:
            for v in range(lanes):
                at = COEFFICIENTS * (b * channels + column + v)
                hi[v] = load_work(coefficients, at)
                scale[v] = load_work(coefficients, at + 1)
                shift[v] = load_work(coefficients, at + 2)
                dscale[v] = work(0)
                if dy != 0:
                    dscale[v] = load_work(coefficients, at + 3)
            row = tile * length + cuda.threadIdx.x // ACROSS
            end = min(o, (tile + 1) * length)
            while row < end:
                here = (b * o + row) * channels + column
                load_lanes(x, here, values)
                for v in range(lanes):
                    values[v] = (values[v] - hi[v]) * scale[v] + shift[v]
                if dy != 0:
                    load_lanes(dy, here, slopes)
                    for v in range(lanes):
                        values[v] += slopes[v] * dscale[v]
                store_lanes(y, here, values)
                row += DOWN

    # ---- rows with a weight for each place: a block a row ------------------------------------

    @cuda.jit
    def element_forward(x, y, weight, bias, mean_out, var_out, rstd_out, g, k, has_mean, eps):
        values = cuda.local.array(lanes, work)
        mean = cuda.local.array(lanes, work)
        m2 = cuda.local.array(lanes, work)
        for v in range(lanes):
            mean[v] = work(0)
            m2[v] = work(0)
        row = int64(cuda.blockIdx.x)
        first = row % g * k
        about = load(x, row * k) * work(has_mean)
        count = work(0)
        at = int64(cuda.threadIdx.x) * lanes
        while at < k:
            load_lanes(x, row * k + at, values)
            count += work(1)
            welford(values, about, mean, m2, work(1) / count)
            at += THREADS * lanes
        n, m, q = merged_lanes(count, mean, m2)
        n, m, q = block_moments(n, m, q)
        var = q / n
        hi = about + m
        lo = (about - hi) + m
        if has_mean == 0:
            var += m * m
            hi = work(0)
            lo = work(0)
        rstd = rstd_of(var, eps)
        shift = -lo * rstd
        if cuda.threadIdx.x == 0:
            store_work(mean_out, row, hi)
            store_work(var_out, row, var)
            store_work(rstd_out, row, rstd)
        at = int64(cuda.threadIdx.x) * lanes
        while at < k:
            load_lanes(x, row * k + at, values)
            for v in range(lanes):
                values[v] = (((values[v] - hi) * rstd + shift)
                             * parameter_or(weight, first + at + v, work(1))
                             + parameter_or(bias, first + at + v, work(0)))
            store_lanes(y, row * k + at, values)
            at += THREADS * lanes

    @cuda.jit
    def element_backward(dy, x, dx, weight, mean, rstd, g, k, has_mean):
        values = cuda.local.array(lanes, work)
        slopes = cuda.local.array(lanes, work)
        row = int64(cuda.blockIdx.x)
        first = row % g * k
        about = load_work(mean, row)
        r = load_work(rstd, row)
        gy = work(0)
        gyd = work(0)
        at = int64(cuda.threadIdx.x) * lanes
        while at < k:
            load_lanes(x, row * k + at, values)
            load_lanes(dy, row * k + at, slopes)
            for v in range(lanes):
                slope = slopes[v] * parameter_or(weight, first + at + v, work(1))
                gy += slope
                gyd += slope * (values[v] - about)
            at += THREADS * lanes
        gy, gyd = block_sums(gy, gyd)
        scale = -r * r * (r * gyd / work(k))
        shift = -r * (gy / work(k))
        if has_mean == 0:
            shift = work(0)
        at = int64(cuda.threadIdx.x) * lanes
        while at < k:
            load_lanes(x, row * k + at, values)
            load_lanes(dy, row * k + at, slopes)
            for v in range(lanes):
                slope = slopes[v] * parameter_or(weight, first + at + v, work(1))
                values[v] = slope * r + (values[v] - about) * scale + shift
            store_lanes(dx, row * k + at, values)
            at += THREADS * lanes

    return SimpleNamespace(
        work=work, lanes=lanes, row_moments=row_moments, row_products=row_products,
        column_moments=column_moments, column_products=column_products,
        finish_forward=finish_forward, finish_backward=finish_backward,
        finish_parameters=finish_parameters, move_running=move_running, map_rows=map_rows,
        map_columns=map_columns, element_forward=element_forward,
        element_backward=element_backward,
    )
