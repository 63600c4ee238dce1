"""Files of preference pairs as other people publish them."""

import json


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def unified(a=1, b=0, source="x/y", prompt="Hi", first="good", second="bad"):
    return {
        "source": source, "conv_A": chat(prompt, first), "conv_B": chat(prompt, second), "conv_A_rating": a,
        "conv_B_rating": b,
    }  # fmt: skip


def many(n, **changes):
    return [unified(prompt=f"question {i}", **changes) for i in range(n)]
