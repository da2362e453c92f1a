# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Asks a running server one question through the openai client, prints the answer as it
arrives, and then what the expert slots did meanwhile."""

import argparse
import re

import httpx
from openai import OpenAI


def totals(url: str) -> dict[str, float]:
    """The server's counters of expert slots, each summed over layers and ranks."""
    metrics = httpx.get(f"{url}/metrics").raise_for_status().text
    sums: dict[str, float] = {}
    samples = re.findall(r"^vllm:moe_prefetch_(\w+)_total\{.*\} (\S+)$", metrics, re.M)
    for name, value in samples:
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="What is a mixture of experts?")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--max-tokens", type=int, default=200)
    asked = parser.parse_args()

    client = OpenAI(base_url=f"{asked.url}/v1", api_key="none")
    before = totals(asked.url)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": asked.question}],
        max_tokens=asked.max_tokens,
        temperature=0,
        stream=True,
    )
    for event in stream:
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
    print()

    after = totals(asked.url)
    if not after:
        print("The server reports no expert slots: it runs without them.")
        return
    spent = {name: total - before.get(name, 0) for name, total in after.items()}
    rate = spent["hits"] / spent["needed"] if spent["needed"] else 1
    print(
        f"{rate:.1%} of the experts needed were in slots; "
        f"{spent['loads']:,.0f} loads, {spent['bytes_loaded']:,.0f} bytes."
    )


if __name__ == "__main__":
    main()
