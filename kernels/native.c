/* Passes over rows of fp32 numbers that kernels/native.py compiles on demand; see there.

   Every result has the bits of the torch operations that it stands for: the same IEEE operations in the same order. The flags
   of native.py forbid the compiler to contract a multiplication and an addition into one rounding. Sums over many numbers,
   whose order differs between libraries, are left to torch. */

#include <math.h>
#include <stdint.h>

#define SMALLEST_SCALE 0x1p-120f

/* z (rows, cols), norm (rows) -> u = z/s, y = s*grid(u), s = norm*factor; u may be z, or NULL if nobody needs it. */
void round_rows(const float *z, const float *restrict norm, float *u, float *restrict y, int64_t rows, int64_t cols,
                float factor, float most)
{
    for (int64_t i = 0; i < rows; i++) {
        const float s = norm[i] * factor;
        const float per_unit = 1.0f / (s < SMALLEST_SCALE ? SMALLEST_SCALE : s); /* a scale that is not a number stays so */
        const float *z_row = z + i * cols;
        float *y_row = y + i * cols;
        if (u) {
            float *u_row = u + i * cols;
            for (int64_t j = 0; j < cols; j++)
                u_row[j] = z_row[j] * per_unit;
            z_row = u_row;
            for (int64_t j = 0; j < cols; j++) {
                const float whole = floorf(fabsf(z_row[j]));
                y_row[j] = copysignf((whole > most ? most : whole) + 0.5f, z_row[j]) * s;
            }
        } else {
            for (int64_t j = 0; j < cols; j++) {
                const float t = z_row[j] * per_unit, whole = floorf(fabsf(t));
                y_row[j] = copysignf((whole > most ? most : whole) + 0.5f, t) * s;
            }
        }
    }
}

/* x (rows, cols), mean_square (rows), gain (cols) -> r = 1/sqrt(mean_square + eps) (rows), y = (x*r)*gain. */
void norm_rows(const float *restrict x, const float *restrict mean_square, const float *restrict gain, float *restrict r,
               float *restrict y, int64_t rows, int64_t cols, float eps)
{
    for (int64_t i = 0; i < rows; i++) {
        r[i] = 1.0f / sqrtf(mean_square[i] + eps);
        for (int64_t j = 0; j < cols; j++)
            y[i * cols + j] = (x[i * cols + j] * r[i]) * gain[j];
    }
}

/* g, the gradient of y -> the terms whose sums over a row and over all rows are those of r and gain. */
void norm_rows_terms(const float *restrict g, const float *restrict x, const float *restrict r, const float *restrict gain,
                     float *restrict of_r, float *restrict of_gain, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i * cols, k = 0; k < cols; j++, k++) {
            of_r[j] = (g[j] * gain[k]) * x[j];
            of_gain[j] = g[j] * (x[j] * r[i]);
        }
}

/* The gradient of x, from g, the gradient of r (rows), and that of x elsewhere, or NULL. */
void norm_rows_backward(const float *restrict g, const float *restrict x, const float *restrict r, const float *restrict gain,
                        const float *restrict grad_r, const float *elsewhere, float *grad_x, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++) {
        const float by_square = (-0.5f * grad_r[i]) * ((r[i] * r[i]) * r[i]) / (float)cols;
        const float *from = elsewhere ? elsewhere + i * cols : 0;
        for (int64_t j = i * cols, k = 0; k < cols; j++, k++) {
            const float direct = (g[j] * gain[k]) * r[i];
            grad_x[j] = (from ? from[k] + direct : direct) + by_square * (2.0f * x[j]);
        }
    }
}

/* x (batch, tokens, heads, 2*half) with these strides, tables (tokens, 2*half) -> dense y = x*cos + x'*sin, where x' is x with its
   halves exchanged; back: y = x*cos + (x*sin)', the transpose of that. torch's addcmul rounds once: so does the first of them. */
void turn_rows(const float *restrict x, const float *restrict cos, const float *restrict sin, float *restrict y, int64_t batch,
               int64_t tokens, int64_t heads, int64_t half, int64_t x_batch, int64_t x_token, int64_t x_head, int64_t back)
{
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = 0; t < tokens; t++) {
            const float *c = cos + t * 2 * half, *s = sin + t * 2 * half;
            for (int64_t h = 0; h < heads; h++, y += 2 * half) {
                const float *low = x + b * x_batch + t * x_token + h * x_head, *high = low + half;
                if (back)
                    for (int64_t j = 0; j < half; j++) {
                        y[j] = low[j] * c[j] + high[j] * s[j + half];
                        y[j + half] = high[j] * c[j + half] + low[j] * s[j];
                    }
                else
                    for (int64_t j = 0; j < half; j++) {
                        y[j] = fmaf(high[j], s[j], low[j] * c[j]);
                        y[j + half] = fmaf(low[j], s[j + half], high[j] * c[j + half]);
                    }
            }
        }
}
