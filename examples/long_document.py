"""A long document is read and compressed once, kept in a file, and asked many questions.

    python examples/long_document.py MODEL BOOK.txt "First question?" "Second question?"

Without arguments the embedded model reads a short text of its own language.
"""

import sys
import tempfile
from pathlib import Path

import kvjax
from kvjax.chat import document_ids, has_chat_template


def answers(model, params, tokenizer, book, questions, policy, file, **settings):
    """Reads the book, writes its compressed cache to `file`, and answers from the file."""
    chat = has_chat_template(tokenizer)  # then the book begins a message, which a question ends
    ids = document_ids(tokenizer, book) if chat else tokenizer(book)["input_ids"]
    context = kvjax.compress(model, params, ids, policy, chat=chat)
    print(f"{len(ids)} tokens read, {context.nbytes:,} bytes kept")
    context.save(file)
    context = kvjax.load_context(file, model, params)
    out = kvjax.generate_text(model, params, tokenizer, questions, context=context, **settings)
    return out.texts


def main(name="builtin:needle", path=None, *questions: str) -> list[str]:
    """Asks each question; prints it with its answer."""
    model, params = kvjax.load(name)
    filler = "the garden is grey and the woman sleeps . " * 20
    book = (
        f"mary 's favorite thing is velvet . {filler} john 's favorite thing is copper . {filler}"
    )
    if path is not None:
        book = Path(path).read_text()
    form = "question : what is the favorite thing of {} ? answer :"
    questions = questions or (form.format("mary"), form.format("john"))
    with tempfile.TemporaryDirectory() as folder:
        asked = model, params, kvjax.load_tokenizer(name), book, questions
        found = answers(*asked, "full:entries=int4", f"{folder}/book.kv", max_new_tokens=32)
    for question, answer in zip(questions, found, strict=True):
        print(f"{question.strip()}{answer}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
