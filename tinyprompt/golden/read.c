/* Read a safetensors file, on a little-endian machine: name, type, shape and sum of every array.
   cc -o read read.c && ./read FILE */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int count, char **words) {
  FILE *file = count == 2 ? fopen(words[1], "rb") : NULL;
  uint64_t length;
  if (!file || fread(&length, 8, 1, file) != 1) return fputs("usage: read FILE\n", stderr), 2;
  char *header = calloc(length + 1, 1), name[200], kind[8], shape[80], number[8];
  if (fread(header, 1, length, file) != length) return 2;
  for (char *at = header + 1; (at = strchr(at, '"')); at = strchr(at, '}') + 1) {
    if (sscanf(at, "\"%199[^\"]\"", name) != 1 || !strcmp(name, "__metadata__")) continue;
    unsigned long long start, end;
    sscanf(strstr(at, "\"dtype\""), "\"dtype\" : \"%7[^\"]", kind);
    sscanf(strstr(at, "\"data_offsets\""), "\"data_offsets\" : [ %llu , %llu ]", &start, &end);
    char *from = strchr(strstr(at, "\"shape\""), '['), *to = strchr(from, ']') + 1;
    snprintf(shape, sizeof shape, "%.*s", (int)(to - from), from);
    size_t size = strcmp(kind, "F32") ? 8 : 4;
    double total = 0;
    fseek(file, (long)(8 + length + start), SEEK_SET);
    for (; start < end && fread(number, size, 1, file) == 1; start += size) {
      double wide; float narrow; int64_t id;
      memcpy(&wide, number, 8), memcpy(&narrow, number, 4), memcpy(&id, number, 8);
      total += *kind == 'I' ? (double)id : size == 4 ? narrow : wide;
    }
    printf("%s %s %s %.12e\n", name, kind, shape, total);
  }
  return fclose(file);
}
