"""Two kinds of load that wrk does not have, from a process of its own, printed as JSON.

python -m benchmarks.serving.load rate URL BODY --key KEY --clients 64 --rate 500 --seconds 10
    requests at a fixed rate, however slow the answers are; latencies count from the time at which a request was due
python -m benchmarks.serving.load streams URL BODY --key KEY --clients 1000
    streams that are all open at the same time, each read to its end
"""

import argparse
import asyncio
import json
import time
from urllib.parse import urlsplit

import uvloop


def _request(url: str, body: bytes, key: str) -> tuple[str, int, bytes]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    return parts.hostname, parts.port, head.encode() + body


async def _whole(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    return head


async def rate(url: str, bodies: list[bytes], key: str, clients: int, per_second: float, seconds: float) -> dict[str, float]:
    """Requests at a fixed rate, spread evenly over the connections.  -> latencies in seconds"""
    latencies: list[float] = []
    bad = 0
    count = int(per_second * seconds)
    began = time.perf_counter() + 0.5

    async def client(number: int) -> None:
        nonlocal bad
        host, port, _ = _request(url, b"", key)
        reader, writer = await asyncio.open_connection(host, port)
        for turn in range(number, count, clients):
            due = began + turn / per_second
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            writer.write(_request(url, bodies[turn % len(bodies)], key)[2])
            head = await _whole(reader)
            latencies.append(time.perf_counter() - due)
            bad += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    latencies.sort()
    taken = time.perf_counter() - began
    return {"requests": count, "per_second": count / taken, "bad": bad} | {
        f"p{share}": latencies[min(int(share / 100 * len(latencies)), len(latencies) - 1)] for share in (50, 90, 99)
    }


async def streams(url: str, bodies: list[bytes], key: str, clients: int) -> dict[str, float]:
    """Streams side by side.  -> how many were whole"""
    whole = events = 0
    errors: list[str] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal whole, events
        host, port, request = _request(url, bodies[number % len(bodies)], key)
        try:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request)
            text = await reader.readuntil(b"0\r\n\r\n")
            writer.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            errors.append(repr(error))
            return
        events += text.count(b"data: ")
        whole += text.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in text

    await asyncio.gather(*map(client, range(clients)))
    return {"streams": clients, "whole": whole, "events": events, "seconds": time.perf_counter() - began, "errors": len(errors)}


def main() -> None:
    """Print the figures of one kind of load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["rate", "streams"])
    parser.add_argument("url")
    parser.add_argument("bodies", help="file of JSON bodies, one a line")
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    with open(options.bodies, "rb") as file:
        bodies = file.read().splitlines()
    if options.kind == "rate":
        work = rate(options.url, bodies, options.key, options.clients, options.rate, options.seconds)
    else:
        work = streams(options.url, bodies, options.key, options.clients)
    print(json.dumps(uvloop.run(work)))


if __name__ == "__main__":
    main()
