/* Answer each line of standard input with a label: ./predict LABELS [PROMPT.npy]
   Reads score.bin, words.bin, LABELS (one label per line) and the prompt (tuned.npy). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "encode.h"
#include "model.h"

#define LINE 65536
#define LABELS 1000

static float prompt[VECTORS][WIDTH], weights[LABELS][TARGET_TOKENS];
static int64_t ids[BATCH][INPUT_TOKENS], mask[BATCH][INPUT_TOKENS], targets[LABELS][TARGET_TOKENS];
static char names[LABELS][256], line[LINE];

static void stop(const char *file, const char *told) {
  fprintf(stderr, "%s: %s\n", file, told);
  exit(2);
}

static int read_line(char *to, int size, FILE *file) { /* without the line break; the rest of a longer line is dropped */
  if (!fgets(to, size, file)) return 0;
  if (!strchr(to, '\n'))
    for (int c = fgetc(file); c != '\n' && c != EOF;) c = fgetc(file);
  to[strcspn(to, "\r\n")] = 0;
  return 1;
}

static int read_labels(const char *name) {
  FILE *file = fopen(name, "r");
  int count = 0;
  if (!file) stop(name, "cannot be opened");
  for (; count < LABELS && read_line(names[count], sizeof names[0], file); count++) {
    int32_t found[TARGET_TOKENS + 1];
    int length = encode(names[count], found, TARGET_TOKENS + 1);
    if (length > TARGET_TOKENS) stop(names[count], "is a label of too many tokens");
    for (int i = 0; i < length; i++) targets[count][i] = found[i], weights[count][i] = 1;
  }
  fclose(file);
  if (!count) stop(name, "has no label");
  return count;
}

static void read_prompt(const char *name) { /* read the data at the end of a .npy file */
  FILE *file = fopen(name, "rb");
  if (!file || fseek(file, -(long)sizeof prompt, SEEK_END) || fread(prompt, 1, sizeof prompt, file) != sizeof prompt)
    stop(name, "cannot be read as a prompt of this program");
  fclose(file);
}

int main(int count, char **words) {
  if (count < 2) stop("usage", "predict LABELS [PROMPT.npy]");
  if (!score_load("score.bin")) return 2;
  if (!encode_load("words.bin")) stop("words.bin", "cannot be read");
  int labels = read_labels(words[1]);
  read_prompt(count > 2 ? words[2] : "tuned.npy");
  while (read_line(line, LINE, stdin)) {
    int32_t found[INPUT_TOKENS];
    int length = encode(line, found, INPUT_TOKENS), best = 0;
    float highest = 0;
    for (int b = 0; b < BATCH; b++)
      for (int i = 0; i < INPUT_TOKENS; i++) ids[b][i] = i < length ? found[i] : 0, mask[b][i] = i < length;
    for (int first = 0; first < labels; first += BATCH) { /* the rows of a batch are labels of one text */
      float scores[BATCH];
      int64_t target[BATCH][TARGET_TOKENS];
      float weight[BATCH][TARGET_TOKENS];
      for (int b = 0; b < BATCH; b++) {
        int label = first + b < labels ? first + b : first;
        memcpy(target[b], targets[label], sizeof target[b]), memcpy(weight[b], weights[label], sizeof weight[b]);
      }
      score(prompt, ids, mask, target, weight, scores);
      for (int b = 0; b < BATCH && first + b < labels; b++)
        if (!(first + b) || scores[b] > highest) highest = scores[b], best = first + b;
    }
    puts(names[best]);
    fflush(stdout);
  }
  return 0;
}
