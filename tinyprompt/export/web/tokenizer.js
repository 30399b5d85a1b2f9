// Convert text to ids like tinyprompt. A table maps each character to other letters, a word break or nothing.

const EOS = 1; // ends every text

export class Tokenizer {
  // about: tokenizer.json of the page.
  constructor({ special, vocabulary, unk, longest, prefix, table }) {
    Object.assign(this, { unk, longest, prefix, table });
    this.special = new Map(Object.entries(special));
    this.vocabulary = new Map(Object.entries(vocabulary));
    this.texts = new Map([...this.vocabulary, ...this.special].map(([text, id]) => [id, text]));
    this.size = 1 + Math.max(...this.texts.keys());
    const names = [...this.special.keys()].sort((a, b) => b.length - a.length);
    this.split = RegExp(`(${names.map(name => name.replace(/\W/g, "\\$&")).join("|") || "$^"})`);
  }

  encode(text) {
    const parts = text.split(this.split).map((part, i) => (i % 2 ? [this.special.get(part)] : this.pieces(part)));
    return [...parts.flat(), EOS];
  }

  // Return the text of an id.
  piece(id) {
    return this.texts.get(id) ?? `<${id}>`;
  }

  pieces(text) {
    const letters = [...text].map(letter => this.becomes(letter)).join("");
    const words = letters.split(" ").filter(word => word);
    return words.flatMap(word => this.word([...word]));
  }

  // The table has sorted rows [first, last, text]; a letter outside the table is unchanged.
  becomes(letter) {
    const code = letter.codePointAt(0);
    let [low, high] = [0, this.table.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.table[middle][1] < code) low = middle + 1;
      else high = middle;
    }
    const [first, , text] = this.table[low] ?? [Infinity];
    return first <= code ? text : letter;
  }

  // Take the longest piece repeatedly (WordPiece). A word with an unknown piece is unknown.
  word(letters) {
    const ids = [];
    for (let start = 0, end; start < letters.length; start = end) {
      const found = end => this.vocabulary.get((start ? this.prefix : "") + letters.slice(start, end).join(""));
      for (end = letters.length; end > start && found(end) === undefined; ) end--;
      if (end === start || letters.length > this.longest) return [this.unk];
      ids.push(found(end));
    }
    return ids;
  }
}
