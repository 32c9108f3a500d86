"""`python -m abyssal.bench.startup FOLDER DEVICE`: from nothing to the first token, timed from the process's start."""

import json
import sys
import time

BEGAN = time.perf_counter()  # before anything heavy is imported


def main(folder: str, device: str) -> None:
    from abyssal.checkpoint import load
    from abyssal.engine import LLM, Sampling

    imported = time.perf_counter() - BEGAN
    model = load(folder, device=device)
    loaded = time.perf_counter() - BEGAN
    llm = LLM(model, max_batch=256, max_context=min(8192, model.config.max_position_embeddings), say=lambda _: None)
    llm.start()
    ready = time.perf_counter() - BEGAN
    next(llm.stream([[1, 2, 3, 4]], Sampling(max_tokens=8, temperature=0, ignore_eos=True)))
    first = time.perf_counter() - BEGAN
    print(json.dumps({"imported": imported, "loaded": loaded, "ready": ready, "first token": first}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
