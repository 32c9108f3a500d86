"""The engine over HTTP, as OpenAI's API speaks it: routes, limits, streams, and one page to look at."""
