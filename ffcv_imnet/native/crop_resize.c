/* Crop, decode, resize and mirror one stored image, in one call.
 *
 * A training crop needs neither the rows and columns of a JPEG outside it nor, when it is shrunk,
 * every pixel inside: libjpeg-turbo skips the former (jpeg_skip_scanlines, jpeg_crop_scanline; the
 * Huffman codes above the crop still have to be read) and decodes at 1/2, 1/4 or 1/8 through smaller
 * inverse DCTs. What is left to shrink, by less than two, is averaged over the area that an output
 * pixel covers (OpenCV's INTER_AREA, PIL's BOX), as the published recipes do; what is enlarged is
 * interpolated linearly.
 *
 * Resizing is two passes of one loop, "a row is a weighted sum of rows", which compilers turn into
 * vector instructions: the columns pass works on transposed blocks of BLOCK rows. All sums are in
 * 16-bit fixed point, so every vector width and every machine gives the same pixels.
 *
 * Scratch memory belongs to the calling thread and grows to the largest crop it has met.
 *
 * Nothing that the caller says of an image is believed: where it lies is compared with the length of
 * the mapping, the crop with the image, the image with the JPEG's own header. Damage ends the
 * decoding at the first warning, and a progressive JPEG has bounds on its scans and its memory.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
/* The machine that runs may have less than the one that built: chosen when the library loads. */
#define FOR_EVERY_CPU __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define FOR_EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 16, LANES = 3 * BLOCK }; /* rows transposed together; their colours side by side */
enum { OK = 0, DAMAGED = 1, OTHER_SIZE = 2, OTHER_COLOURS = 3, NO_MEMORY = 4, OUTSIDE = 5, TOO_MUCH = 6 };
enum { LONGEST = 65535, WIDEST_OUT = 1 << 14 }; /* sides in pixels: of an image, of what comes out */
/* Of a progressive JPEG: encoders make about ten scans; each goes over all coefficients once more. */
enum { MOST_SCANS = 100 };
static const long MOST_MEMORY = 512L << 20; /* bytes of its coefficients: about 90 million pixels */

/* ---- memory of a thread ------------------------------------------------------------------------ */

typedef struct {
    struct jpeg_error_mgr manager; /* first: libjpeg hands back a pointer to it */
    jmp_buf escape;
    int status;
} Errors;

typedef struct {
    void *memory;
    size_t size;
} Buffer;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_progress_mgr progress;
    Errors errors;
    Buffer pixels, middle, turned, narrow, row_taps, column_taps;
} Thread;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void leave(j_common_ptr jpeg, int status) {
    Errors *errors = (Errors *)jpeg->err;
    errors->status = status;
    longjmp(errors->escape, 1);
}

static void fail(j_common_ptr jpeg) {
    int code = jpeg->err->msg_code; /* libjpeg asks for a file where its memory has a limit */
    leave(jpeg, code == JERR_OUT_OF_MEMORY ? NO_MEMORY : code == JERR_NO_BACKING_STORE ? TOO_MUCH : DAMAGED);
}

static void fail_at_warning(j_common_ptr jpeg, int level) {
    if (level < 0) leave(jpeg, DAMAGED);
}

static void count_scans(j_common_ptr jpeg) {
    if (jpeg->is_decompressor && ((j_decompress_ptr)jpeg)->input_scan_number > MOST_SCANS) leave(jpeg, TOO_MUCH);
}

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

static void release(void *memory) {
    Thread *thread = memory;
    Buffer *buffers = &thread->pixels;
    jpeg_destroy_decompress(&thread->jpeg);
    for (int i = 0; i < 6; i++) free(buffers[i].memory);
    free(thread);
}

static void make_key(void) { pthread_key_create(&key, release); }

/* This thread's memory, made at its first call; NULL if there is none. */
static Thread *own_memory(void) {
    pthread_once(&once, make_key);
    Thread *thread = pthread_getspecific(key);
    if (thread != NULL) return thread;
    thread = calloc(1, sizeof(Thread));
    if (thread == NULL) return NULL;
    thread->jpeg.err = jpeg_std_error(&thread->errors.manager);
    thread->errors.manager.error_exit = fail;
    thread->errors.manager.emit_message = fail_at_warning;
    thread->errors.manager.output_message = say_nothing;
    if (setjmp(thread->errors.escape)) { /* another libjpeg than at compile time, or no memory */
        free(thread);
        return NULL;
    }
    jpeg_create_decompress(&thread->jpeg);
    thread->jpeg.mem->max_memory_to_use = MOST_MEMORY;
    thread->progress.progress_monitor = count_scans;
    thread->jpeg.progress = &thread->progress;
    pthread_setspecific(key, thread);
    return thread;
}

/* At least `size` bytes; old content is lost. NULL if there is no memory. */
static void *room(Buffer *buffer, size_t size) {
    if (buffer->size < size) {
        free(buffer->memory);
        buffer->size = 0;
        if (posix_memalign(&buffer->memory, 64, size)) buffer->memory = NULL;
        if (buffer->memory == NULL) return NULL;
        buffer->size = size;
    }
    return buffer->memory;
}

/* ---- weights ----------------------------------------------------------------------------------- */

typedef struct {
    int32_t first, count; /* of the source rows (or columns) that one output row is made of */
} Span;

typedef struct {
    int widest;
    Span *spans;       /* one an output row */
    uint16_t *weights; /* `widest` an output row; those in use sum to 65535 */
} Taps;

/* How much of an output row that is centred at `centre` a source row shows, unnormalised: where
 * `scale` source rows make one, what it covers of them; else its place under a triangle. */
INLINE double seen(int row, double centre, double scale) {
    double low = centre - scale / 2, high = centre + scale / 2, far = row + 0.5 - centre;
    if (scale < 1) return far < -1 || far > 1 ? 0 : 1 - (far < 0 ? -far : far);
    low = low > row ? low : row;
    high = high < row + 1 ? high : row + 1;
    return high > low ? high - low : 0;
}

/* Weights for `out` rows over [start, start + length) of a source whose rows `low` to `high` may be
 * used. 0 if there is no memory. */
static int make_taps(Buffer *buffer, Taps *taps, double start, double length, int low, int high, int out) {
    double scale = length / out, reach = scale < 1 ? 1 : scale / 2;
    taps->widest = (int)(2 * reach) + 3;
    char *memory = room(buffer, out * (sizeof(Span) + taps->widest * sizeof(uint16_t)));
    if (memory == NULL) return 0;
    taps->spans = (Span *)memory;
    taps->weights = (uint16_t *)(memory + out * sizeof(Span));
    for (int i = 0; i < out; i++) {
        double centre = start + (i + 0.5) * scale, total = 0;
        int first = (int)(centre - reach), end = (int)(centre + reach) + 1;
        if (first < low) first = low;
        if (end > high) end = high;
        if (first >= end) first = end - 1; /* beyond the last row by a rounding error */
        uint16_t *weights = taps->weights + (size_t)i * taps->widest;
        int count = end - first, left = 65535, best = 0;
        for (int k = 0; k < count; k++) total += seen(first + k, centre, scale);
        for (int k = 0; k < count; k++) {
            double weight = total > 0 ? seen(first + k, centre, scale) / total : 0;
            weights[k] = (uint16_t)(weight * 65535 + 0.5);
            left -= weights[k];
            if (weights[k] > weights[best]) best = k;
        }
        weights[best] += left;
        while (count > 1 && weights[count - 1] == 0) count--;
        while (count > 1 && weights[0] == 0) {
            memmove(weights, weights + 1, --count * sizeof(uint16_t));
            first++;
        }
        taps->spans[i] = (Span){first, count};
    }
    return 1;
}

/* ---- the loop ---------------------------------------------------------------------------------- */

/* Half of what cutting `count` products to 16 bits loses; kept small enough for sums to fit. */
INLINE uint16_t lost(int count) { return count < 120 ? count / 2 : 60; }

INLINE uint16_t high(uint16_t a, uint16_t b) { return (uint16_t)(((uint32_t)a * b) >> 16); }

/* into[i] = sum over k of weights[k] * from[k * stride + i], bytes to 8.8 fixed point. */
INLINE void blend_bytes(uint16_t *restrict into, const uint8_t *restrict from, ptrdiff_t stride,
                        const uint16_t *restrict weights, const int count, int width) {
    for (int i = 0; i < width; i++) {
        uint16_t sum = lost(count);
        for (int k = 0; k < count; k++) sum += high((uint16_t)(from[k * stride + i] << 8), weights[k]);
        into[i] = sum;
    }
}

INLINE void add_bytes(uint16_t *restrict into, const uint8_t *restrict from, uint16_t weight, int width) {
    for (int i = 0; i < width; i++) into[i] += high((uint16_t)(from[i] << 8), weight);
}

/* The same for LANES values in 8.8, rounded to bytes. */
INLINE void blend_words(uint8_t *restrict into, const uint16_t *restrict from,
                        const uint16_t *restrict weights, const int count) {
    uint16_t sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = (uint16_t)(128 + lost(count));
    for (int k = 0; k < count; k++)
        for (int i = 0; i < LANES; i++) sums[i] += high(from[k * LANES + i], weights[k]);
    for (int i = 0; i < LANES; i++) into[i] = (uint8_t)(sums[i] >> 8);
}

/* Few taps are the rule; a constant count lets the compiler keep sums in registers. */
INLINE void make_row(uint16_t *into, const uint8_t *from, ptrdiff_t stride, const uint16_t *weights,
                     int count, int width) {
    switch (count) {
    case 1: blend_bytes(into, from, stride, weights, 1, width); return;
    case 2: blend_bytes(into, from, stride, weights, 2, width); return;
    case 3: blend_bytes(into, from, stride, weights, 3, width); return;
    case 4: blend_bytes(into, from, stride, weights, 4, width); return;
    }
    blend_bytes(into, from, stride, weights, 4, width);
    for (int i = 0; i < width; i++) into[i] += lost(count) - lost(4);
    for (int k = 4; k < count; k++) add_bytes(into, from + k * stride, weights[k], width);
}

INLINE void make_column(uint8_t *into, const uint16_t *from, const uint16_t *weights, int count) {
    switch (count) {
    case 1: blend_words(into, from, weights, 1); return;
    case 2: blend_words(into, from, weights, 2); return;
    case 3: blend_words(into, from, weights, 3); return;
    case 4: blend_words(into, from, weights, 4); return;
    default: blend_words(into, from, weights, count); return;
    }
}

/* ---- transposing ------------------------------------------------------------------------------- */

typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
#ifdef __clang__
#define LOW_WORDS(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_WORDS(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW_BYTES(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_BYTES(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define LOW_WORDS(a, b) __builtin_shuffle(a, b, (Words){0, 8, 1, 9, 2, 10, 3, 11})
#define HIGH_WORDS(a, b) __builtin_shuffle(a, b, (Words){4, 12, 5, 13, 6, 14, 7, 15})
#define LOW_BYTES(a, b) \
    __builtin_shuffle(a, b, (Bytes){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define HIGH_BYTES(a, b) \
    __builtin_shuffle(a, b, (Bytes){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#endif

/* BLOCK rows of `width` words (padded to a multiple of 8) become `width` rows of BLOCK. Interleaving
 * the first half of the rows with the second, log2(rows) times, is a transposition. */
INLINE void turn_words(uint16_t *restrict into, const uint16_t *restrict from, int stride, int width) {
    for (int column = 0; column < width; column += 8)
        for (int half = 0; half < BLOCK; half += 8) {
            Words a[8], b[8];
            for (int i = 0; i < 8; i++) memcpy(&a[i], from + (half + i) * stride + column, 16);
            for (int i = 0; i < 4; i++) b[2 * i] = LOW_WORDS(a[i], a[i + 4]), b[2 * i + 1] = HIGH_WORDS(a[i], a[i + 4]);
            for (int i = 0; i < 4; i++) a[2 * i] = LOW_WORDS(b[i], b[i + 4]), a[2 * i + 1] = HIGH_WORDS(b[i], b[i + 4]);
            for (int i = 0; i < 4; i++) b[2 * i] = LOW_WORDS(a[i], a[i + 4]), b[2 * i + 1] = HIGH_WORDS(a[i], a[i + 4]);
            for (int i = 0; i < 8; i++) memcpy(into + (column + i) * BLOCK + half, &b[i], 16);
        }
}

/* 16 rows of BLOCK bytes become BLOCK rows of 16, `stride` apart; the first `rows` are written. */
INLINE void turn_bytes(uint8_t *restrict into, ptrdiff_t stride, int rows, int columns,
                       const uint8_t *restrict from) {
    Bytes a[16], b[16];
    for (int i = 0; i < 16; i++) memcpy(&a[i], from + i * BLOCK, 16);
    for (int i = 0; i < 8; i++) b[2 * i] = LOW_BYTES(a[i], a[i + 8]), b[2 * i + 1] = HIGH_BYTES(a[i], a[i + 8]);
    for (int i = 0; i < 8; i++) a[2 * i] = LOW_BYTES(b[i], b[i + 8]), a[2 * i + 1] = HIGH_BYTES(b[i], b[i + 8]);
    for (int i = 0; i < 8; i++) b[2 * i] = LOW_BYTES(a[i], a[i + 8]), b[2 * i + 1] = HIGH_BYTES(a[i], a[i + 8]);
    for (int i = 0; i < 8; i++) a[2 * i] = LOW_BYTES(b[i], b[i + 8]), a[2 * i + 1] = HIGH_BYTES(b[i], b[i + 8]);
    if (rows == BLOCK && columns == 16)
        for (int i = 0; i < BLOCK; i++) memcpy(into + i * stride, &a[i], 16);
    else
        for (int i = 0; i < rows; i++) memcpy(into + i * stride, &a[i], columns);
}

/* ---- resizing ---------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *pixels; /* RGB */
    ptrdiff_t stride;      /* bytes between rows */
    int rows, columns;
    double top, left, height, width; /* the crop, in pixels of this image */
} Image;

FOR_EVERY_CPU
static int resize(Thread *thread, const Image *from, uint8_t *out, int out_rows, int out_columns, int mirrored) {
    int first_column = (int)from->left, last_column = (int)(from->left + from->width + 0.9999);
    int first_row = (int)from->top, last_row = (int)(from->top + from->height + 0.9999);
    if (last_column > from->columns) last_column = from->columns;
    if (last_row > from->rows) last_row = from->rows;
    Taps rows, columns;
    int width = 3 * (last_column - first_column), padded = (width + 7) / 8 * 8;
    int samples = 3 * out_columns, padded_samples = (samples + 15) / 16 * 16;
    uint16_t *middle = room(&thread->middle, sizeof(uint16_t) * BLOCK * padded);
    uint16_t *turned = room(&thread->turned, sizeof(uint16_t) * BLOCK * padded);
    uint8_t *narrow = room(&thread->narrow, BLOCK * padded_samples);
    if (middle == NULL || turned == NULL || narrow == NULL) return NO_MEMORY;
    if (!make_taps(&thread->row_taps, &rows, from->top, from->height, first_row, last_row, out_rows) ||
        !make_taps(&thread->column_taps, &columns, from->left - first_column, from->width, 0,
                   last_column - first_column, out_columns))
        return NO_MEMORY;

    for (int block = 0; block < out_rows; block += BLOCK) {
        int count = out_rows - block < BLOCK ? out_rows - block : BLOCK;
        for (int i = 0; i < count; i++) {
            Span span = rows.spans[block + i];
            make_row(middle + i * padded, from->pixels + span.first * from->stride + 3 * first_column,
                     from->stride, rows.weights + (size_t)(block + i) * rows.widest, span.count, width);
        }
        turn_words(turned, middle, padded, width);
        for (int x = 0; x < out_columns; x++) {
            Span span = columns.spans[x];
            make_column(narrow + (mirrored ? out_columns - 1 - x : x) * LANES, turned + span.first * LANES,
                        columns.weights + (size_t)x * columns.widest, span.count);
        }
        uint8_t *row = out + (size_t)block * samples;
        for (int x = 0; x < samples; x += 16)
            turn_bytes(row + x, samples, count, samples - x < 16 ? samples - x : 16, narrow + x * BLOCK);
    }
    return OK;
}

/* ---- decoding ---------------------------------------------------------------------------------- */

/* The largest shrinking that leaves at least `out` pixels of `length`. */
static int shrinking(int height, int width, int out_rows, int out_columns) {
    int by = 1;
    while (by < 8 && height >= 2 * by * out_rows && width >= 2 * by * out_columns) by *= 2;
    return by;
}

/* Decode what the crop (rows, columns of the whole image) needs, shrunk by `by`. */
static int decode(Thread *thread, const uint8_t *stored, size_t size, int height, int width, int top,
                  int left, int rows, int columns, int by, Image *image) {
    struct jpeg_decompress_struct *jpeg = &thread->jpeg;
    if (setjmp(thread->errors.escape)) {
        jpeg_abort_decompress(jpeg);
        return thread->errors.status;
    }
    jpeg_mem_src(jpeg, stored, size);
    jpeg_read_header(jpeg, TRUE);
    int status = OK;
    if ((int)jpeg->image_height != height || (int)jpeg->image_width != width) status = OTHER_SIZE;
    if (jpeg->num_components != 1 && jpeg->num_components != 3) status = OTHER_COLOURS;
    if (status != OK) {
        jpeg_abort_decompress(jpeg);
        return status;
    }
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg->scale_num = 1;
    jpeg->scale_denom = by;
    jpeg_start_decompress(jpeg);
    if ((int)jpeg->output_height != (height + by - 1) / by || (int)jpeg->output_width != (width + by - 1) / by)
        leave((j_common_ptr)jpeg, DAMAGED); /* of a kind that is not shrunk: lossless */

    /* One more pixel on each side: chroma is interpolated between neighbours. */
    JDIMENSION above = top / by, below = (top + rows + by - 1) / by;
    JDIMENSION x = left / by, end = (left + columns + by - 1) / by + 2;
    x = x > 0 ? x - 1 : 0;
    above = above > 0 ? above - 1 : 0;
    if (end > jpeg->output_width) end = jpeg->output_width;
    JDIMENSION wide = end - x;
    if (wide < jpeg->output_width) jpeg_crop_scanline(jpeg, &x, &wide);
    if (above > 0) above = jpeg_skip_scanlines(jpeg, above);
    size_t stride = 3 * (size_t)jpeg->output_width;
    uint8_t *pixels = room(&thread->pixels, stride * (below - above) + 64);
    if (pixels == NULL) {
        jpeg_abort_decompress(jpeg);
        return NO_MEMORY;
    }
    while (jpeg->output_scanline < below) {
        JSAMPROW some[4];
        JDIMENSION next = jpeg->output_scanline, want = below - next < 4 ? below - next : 4;
        for (JDIMENSION i = 0; i < want; i++) some[i] = pixels + (next + i - above) * stride;
        jpeg_read_scanlines(jpeg, some, want);
    }
    *image = (Image){
        .pixels = pixels,
        .stride = stride,
        .rows = below - above,
        .columns = wide,
        .top = (double)top / by - above,
        .left = (double)left / by - x,
        .height = (double)rows / by,
        .width = (double)columns / by,
    };
    jpeg_abort_decompress(jpeg); /* what lies below the crop is not even read */
    return OK;
}

/* ---- the interface ----------------------------------------------------------------------------- */

/* Whether the crop lies in an image of possible size, and `out` has a possible size too. */
static int sound(int64_t height, int64_t width, int64_t top, int64_t left, int64_t rows, int64_t columns,
                 int64_t out_rows, int64_t out_columns) {
    return height >= 1 && width >= 1 && height <= LONGEST && width <= LONGEST && top >= 0 && left >= 0 &&
           rows >= 1 && columns >= 1 && rows <= height && columns <= width && top <= height - rows &&
           left <= width - columns && out_rows >= 1 && out_columns >= 1 && out_rows <= WIDEST_OUT &&
           out_columns <= WIDEST_OUT;
}

/* Fill `out` (out_rows, out_columns, 3) with the crop of an image of (height, width) px: the `size`
 * bytes from `start` of a `file` of `length` bytes, a JPEG or raw RGB. Where the result is not 0, `out`
 * is black. */
int64_t ffcv_imnet_crop_resize(const uint8_t *file, int64_t length, int64_t start, int64_t size, int64_t is_jpeg,
                               int64_t height, int64_t width, int64_t top, int64_t left, int64_t rows,
                               int64_t columns, uint8_t *out, int64_t out_rows, int64_t out_columns,
                               int64_t mirrored) {
    if (out_rows < 1 || out_columns < 1 || out_rows > WIDEST_OUT || out_columns > WIDEST_OUT) return OUTSIDE;
    int status = OK;
    if (start < 0 || size < 1 || start > length || size > length - start) status = OUTSIDE;
    if (!sound(height, width, top, left, rows, columns, out_rows, out_columns)) status = OUTSIDE;
    Thread *thread = status == OK ? own_memory() : NULL;
    if (status == OK && thread == NULL) status = NO_MEMORY;
    if (status == OK && !is_jpeg && size < 3 * height * width) status = OUTSIDE;
    if (status == OK) {
        Image image = {file + start, 3 * width, height, width, top, left, rows, columns};
        if (is_jpeg)
            status = decode(thread, file + start, size, height, width, top, left, rows, columns,
                            shrinking(rows, columns, out_rows, out_columns), &image);
        if (status == OK) status = resize(thread, &image, out, out_rows, out_columns, mirrored);
    }
    if (status != OK) memset(out, 0, 3 * (size_t)out_rows * out_columns);
    return status;
}

/* Only the decoding of the above, for measuring: the pixels stay in scratch memory. */
int64_t ffcv_imnet_crop_decode(const uint8_t *stored, int64_t size, int64_t height, int64_t width, int64_t top,
                               int64_t left, int64_t rows, int64_t columns, int64_t out_rows,
                               int64_t out_columns) {
    if (!sound(height, width, top, left, rows, columns, out_rows, out_columns)) return OUTSIDE;
    Image image;
    Thread *thread = own_memory();
    if (thread == NULL) return NO_MEMORY;
    return decode(thread, stored, size, height, width, top, left, rows, columns,
                  shrinking(rows, columns, out_rows, out_columns), &image);
}

/* Scratch memory of the calling thread, bytes; libjpeg's own (about 0.1 MB) is not counted. */
int64_t ffcv_imnet_scratch_bytes(void) {
    Thread *thread = own_memory();
    int64_t total = sizeof(Thread);
    Buffer *buffers = &thread->pixels;
    for (int i = 0; thread != NULL && i < 6; i++) total += buffers[i].size;
    return thread == NULL ? 0 : total;
}
