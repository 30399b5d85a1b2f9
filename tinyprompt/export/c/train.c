/* Train a soft prompt: ./train ROWS [STEPS [LEARNING_RATE]]
   Reads step.bin, score.bin, prompt.npy and ROWS; writes tuned.npy. All numbers in the files are little-endian. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "model.h"

#define MAGIC 0x31505254 /* "TRP1" */
#define SIZE (VECTORS * WIDTH)

typedef struct {
  int32_t label, length, ids[INPUT_TOKENS];
} Row;

static int32_t head[6]; /* MAGIC, INPUT_TOKENS, TARGET_TOKENS, numbers of labels, training rows and test rows */
static int32_t *labels; /* per label: length, then TARGET_TOKENS ids */
static Row *rows;
static int64_t ids[BATCH][INPUT_TOKENS], mask[BATCH][INPUT_TOKENS], targets[BATCH][TARGET_TOKENS];
static float weights[BATCH][TARGET_TOKENS], prompt[VECTORS][WIDTH], gradient[VECTORS][WIDTH], mean[SIZE], square[SIZE];

static void stop(const char *file, const char *told) {
  fprintf(stderr, "%s: %s\n", file, told);
  exit(2);
}

static void read_whole(FILE *file, const char *name, void *to, size_t size) {
  if (fread(to, 1, size, file) != size) stop(name, "cut short; write it again");
}

static FILE *open_file(const char *name, const char *mode) {
  FILE *file = fopen(name, mode);
  if (!file) stop(name, "cannot be opened");
  return file;
}

static void read_rows(const char *name) {
  FILE *file = open_file(name, "rb");
  read_whole(file, name, head, sizeof head);
  if (head[0] != MAGIC || head[1] != INPUT_TOKENS || head[2] != TARGET_TOKENS || head[3] < 1 || head[4] < 1 || head[5] < 0)
    stop(name, "has rows of other shapes than this program; write both at once, by tinyprompt export --c");
  size_t label_size = sizeof(int32_t) * (1 + TARGET_TOKENS) * (size_t)head[3];
  size_t row_size = sizeof(Row) * ((size_t)head[4] + (size_t)head[5]);
  if (!(labels = malloc(label_size)) || !(rows = malloc(row_size))) stop(name, "too large for this machine");
  read_whole(file, name, labels, label_size);
  read_whole(file, name, rows, row_size);
  fclose(file);
}

static void place(int at, const Row *row, int label) { /* put a row with the ids of a label into the batch */
  const int32_t *target = labels + label * (1 + TARGET_TOKENS);
  for (int i = 0; i < INPUT_TOKENS; i++) ids[at][i] = row->ids[i], mask[at][i] = i < row->length;
  for (int i = 0; i < TARGET_TOKENS; i++) targets[at][i] = target[1 + i], weights[at][i] = i < target[0];
}

static double accuracy(void) {
  int right = 0;
  for (int first = 0; first < head[5]; first += BATCH) {
    float best[BATCH], found[BATCH];
    int chosen[BATCH];
    for (int label = 0; label < head[3]; label++) {
      for (int i = 0; i < BATCH; i++) place(i, rows + head[4] + (first + i < head[5] ? first + i : first), label);
      score(prompt, ids, mask, targets, weights, found);
      for (int i = 0; i < BATCH; i++)
        if (!label || found[i] > best[i]) best[i] = found[i], chosen[i] = label;
    }
    for (int i = 0; i < BATCH && first + i < head[5]; i++) right += chosen[i] == rows[head[4] + first + i].label;
  }
  return (double)right / head[5];
}

static uint32_t draw(void) { /* xorshift: the same rows on every machine */
  static uint32_t state = 2463534242u;
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

int main(int count, char **words) {
  if (count < 2) stop("usage", "train ROWS [STEPS [LEARNING_RATE]]");
  int steps = count > 2 ? atoi(words[2]) : 100;
  double rate = count > 3 ? atof(words[3]) : 0.3;
  if (!step_load("step.bin") || !score_load("score.bin")) return 2;
  read_rows(words[1]);
  unsigned char start[12] = {0};
  static char header[65536];
  FILE *file = open_file("prompt.npy", "rb");
  read_whole(file, "prompt.npy", start, 10);
  size_t length = start[8] + 256u * start[9];
  read_whole(file, "prompt.npy", header, length);
  read_whole(file, "prompt.npy", prompt, sizeof prompt);
  fclose(file);

  clock_t begin = clock();
  for (int t = 1; t <= steps; t++) {
    float loss;
    for (int i = 0; i < BATCH; i++) {
      const Row *row = rows + draw() % (uint32_t)head[4];
      place(i, row, row->label);
    }
    step(prompt, ids, mask, targets, weights, &loss, gradient);
    for (int i = 0; i < SIZE; i++) { /* Adam */
      float g = ((float *)gradient)[i];
      mean[i] = 0.9f * mean[i] + 0.1f * g;
      square[i] = 0.999f * square[i] + 0.001f * g * g;
      ((float *)prompt)[i] -= (float)(rate * (mean[i] / (1 - pow(0.9, t))) / (sqrt(square[i] / (1 - pow(0.999, t))) + 1e-8));
    }
    if (t == 1 || t == steps || t % 10 == 0) printf("step %d loss %.6f\n", t, loss), fflush(stdout);
  }
  double ms = steps > 0 ? 1e3 * (double)(clock() - begin) / CLOCKS_PER_SEC / steps : 0;

  file = open_file("tuned.npy", "wb");
  fwrite(start, 1, 10, file), fwrite(header, 1, length, file), fwrite(prompt, 1, sizeof prompt, file);
  if (ferror(file) | fclose(file)) stop("tuned.npy", "cannot be written");
  if (head[5]) printf("accuracy %.6f\n", accuracy());
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  printf("%.1f ms a step, %ld kB of memory at most\n", ms, used.ru_maxrss);
  return 0;
}
