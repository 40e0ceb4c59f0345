"""Storms a server of its own: idle connections, slow readers, malformed bodies, and twice the requests it can take, of whose clients
some leave before the end. Needs nothing but Python, and with --tls the program openssl.

    cargo build --release -p moe-serve
    python3 moe-serve/tests/clients/storm.py --server target/release/moe-serve --seconds 180 --idle 3000 --csv storm.csv [-- FLAGS]

What follows `--` goes to the server. With --tls all of it goes over TLS, with a certificate made for it; of the idle connections half
never say so much as hello. Every second it writes the server's memory and what has happened so far into the CSV, and draws
both into an SVG beside it at the end. It fails
unless each request that was sent was answered whole, refused, or given up, the server's own counts agree with that, and the server
answers at the end as it did at the beginning.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import resource
import signal
import ssl
import subprocess
import sys
import tempfile
import time

PROMPT = "Once upon a time, there was a"
CLOSED = (ConnectionError, asyncio.IncompleteReadError, TimeoutError, ssl.SSLError)


class Broken(Exception):
    """The server did what it should not."""


class Counts(collections.Counter):
    """`sent`, and what became of it: `finished`, `refused`, `cancelled`."""

    def __init__(self):
        super().__init__()
        self.statuses = collections.Counter()

    def check(self):
        ends = self["finished"] + self["refused"] + self["cancelled"]
        if self["sent"] != ends:
            raise Broken(f"{self['sent']} requests were sent, and {ends} came to an end")


def request(path, body, content_type="application/json"):
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def connect(at, is_bare=False):
    tls = None if is_bare else at.tls
    return await asyncio.wait_for(asyncio.open_connection(at.host, at.port, limit=1 << 16, ssl=tls), 120)


async def head_of(reader):
    """The status of an answer, and whether its body comes in chunks."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 300)).decode("latin1").lower()
    return int(head.split()[1]), "transfer-encoding: chunked" in head


async def blocks(reader):
    """What comes of a body until the server closes."""
    while block := await asyncio.wait_for(reader.read(1 << 16), 300):
        yield block


def some_request(rng):
    """One of what clients ask for."""
    settings = {"max_tokens": rng.choice([4, 16, 48]), "seed": rng.randrange(1 << 30), "temperature": rng.choice([0, 0.8])}
    stream = rng.random() < 0.6
    kind = rng.choice(["completion", "chat", "response", "json", "several"])
    messages = [{"role": "user", "content": f"Hello! What did you do on day {rng.randrange(1000)}?"}]
    if kind == "chat":
        return "/v1/chat/completions", {"messages": messages, "stream": stream, **settings}
    if kind == "json":
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {
            "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"], "additionalProperties": False}}}
        return "/v1/chat/completions", {"messages": messages, "stream": stream, "response_format": form, **settings}
    if kind == "response":
        settings["max_output_tokens"] = settings.pop("max_tokens")
        return "/v1/responses", {"input": messages, "stream": stream, **settings}
    several = {"n": 2, "logprobs": 3} if kind == "several" else {}
    return "/v1/completions", {"prompt": f"{PROMPT} {rng.randrange(1000)}", "stream": stream, **several, **settings}


async def send(at, data):
    """A connection on which a request was sent, and how long that took."""
    begun = time.monotonic()
    reader, writer = await connect(at)
    writer.write(data)
    return reader, writer, time.monotonic() - begun


def count_closed(counts, path, seconds, error):
    """Where all connections are taken, one that says nothing for a second may be closed; no other may."""
    if seconds < 1:
        raise Broken(f"{path}, sent within {seconds:.2f} s, was not answered: {error!r}") from error
    counts["refused"] += 1
    counts["too slow to send"] += 1


async def ask(at, counts, rng, leaves=False):
    """Sends a request, and counts what becomes of it."""
    path, body = some_request(rng)
    counts["sent"] += 1
    reader, writer, seconds = await send(at, request(path, json.dumps(body).encode()))
    try:
        if leaves and not body["stream"]:
            await asyncio.sleep(rng.random() * 0.3)
            counts["cancelled"] += 1
            return
        try:
            status, chunked = await head_of(reader)
        except CLOSED as error:
            return count_closed(counts, path, seconds, error)
        counts.statuses[status] += 1
        if status != 200:
            if status not in (429, 503, 504):
                raise Broken(f"{status} for {body}: {(await reader.read(500)).decode()}")
            counts["refused"] += 1
            return
        text = b""
        async for block in blocks(reader):
            text = (text + block)[-4000:]
            if leaves:
                counts["cancelled"] += 1
                return
        whole = text.endswith(b"\r\n0\r\n\r\n") if chunked else text.endswith(b"}")
        ended = not body["stream"] or b"data: [DONE]" in text or b"event: response." in text
        if not (whole and ended) or b'"error":{' in text:
            raise Broken(f"{body} ended with {text[-300:]}")
        counts["finished"] += 1
    except CLOSED as error:
        raise Broken(f"{path}: the answer broke off: {error!r}") from error
    finally:
        writer.transport.abort()


def has_closed(at, port):
    """Whether the server has closed its end of the connection from this port: while a client reads nothing it cannot hear of that."""
    with open("/proc/net/tcp") as file:
        for line in file:
            _, local, remote, state, *_ = line.split()
            if local.endswith(f":{at.port:04X}") and remote.endswith(f":{port:04X}"):
                return state != "01"
    return True


async def read_slowly(at, counts, rng, until):
    """Takes a byte now and then of an answer that no buffer holds, until the server has had enough."""
    body = {"prompt": [PROMPT] * 32, "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 20, "return_expert_choices": True}
    while time.monotonic() < until:
        counts["sent"] += 1
        reader, writer, seconds = await send(at, request("/v1/completions", json.dumps(body).encode()))
        try:
            try:
                status, _ = await head_of(reader)
            except CLOSED as error:
                count_closed(counts, "/v1/completions", seconds, error)
                continue
            counts.statuses[status] += 1
            if status != 200:
                counts["refused"] += 1
                await asyncio.sleep(2 * rng.random())
                continue
            port = writer.get_extra_info("sockname")[1]
            begun = time.monotonic()
            while time.monotonic() < until and not has_closed(at, port):
                if time.monotonic() > begun + 120:
                    raise Broken("a client that takes two bytes a second was served for two minutes")
                await asyncio.wait_for(reader.read(2), 60)
                await asyncio.sleep(1)
            counts["slow readers cut off"] += has_closed(at, port)
            counts["cancelled"] += 1
        finally:
            writer.transport.abort()


async def stay_idle(at, counts, rng, until):
    """A connection that sends nothing, or half a head; opened again some seconds after the server has closed it."""
    await asyncio.sleep(5 * rng.random())
    while time.monotonic() < until:
        try:
            reader, writer = await connect(at, is_bare=rng.random() < 0.5)
        except CLOSED + (OSError,):
            counts["idle connections refused"] += 1
            await asyncio.sleep(1)
            continue
        counts["idle connections"] += 1
        counts["idle now"] += 1
        try:
            if rng.random() < 0.3:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: loc")
            await asyncio.wait_for(reader.read(1), max(until - time.monotonic(), 0.1))
        except CLOSED:
            pass
        finally:
            counts["idle now"] -= 1
            writer.transport.abort()
        await asyncio.sleep(5 + 5 * rng.random())


def malformed(rng):
    """Bytes that are no request that could be answered, and the statuses that say so; none where the connection may just end."""
    path = "/v1/completions"
    good = json.dumps({"prompt": PROMPT, "max_tokens": 2}).encode()
    return rng.choice([
        (request(path, good[:-3]), {400}),
        (request(path, b"[" * 100_000), {400}),
        (request(path, b'{"prompt": "\xff\xfe"}'), {400}),
        (request(path, b'{"prompt": ' + b"1," * 500_000 + b"1}"), {400}),
        (request(path, json.dumps({"prompt": PROMPT, "temperature": 999999}).encode()), {400}),
        (request(path, json.dumps({"prompt": PROMPT, "top_p": -1}).encode()), {400}),
        (request(path, json.dumps({"prompt": PROMPT, "n": 16384}).encode()), {400}),
        (request(path, json.dumps({"prompt": PROMPT, "stop": "x" * (1 << 20)}).encode()), {400}),
        (request(path, json.dumps({"prompt": "x" * (1 << 20)}).encode()), {400}),
        (request(path, json.dumps({"prompt": PROMPT, "structured_outputs": {"regex": "("}}).encode()), {400}),
        (request(path, good, "text/plain"), {415}),
        (request("/v1/nothing", good), {404}),
        (request(path, good).replace(b"content-length: ", b"content-length: 99999999999"), {413}),
        (request(path, good).replace(b"content-length: ", b"content-length: -"), {400}),
        (request(path, b"").replace(b"content-length: 0", b"transfer-encoding: chunked") + b"zz\r\n", {400}),
        (bytes(rng.randrange(256) for _ in range(300)) + b"\r\n\r\n", {400, None}),
        (b"GET /health HTTP/9.9\r\n\r\n", {400, 505, None}),
        (b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * (1 << 20) + b"\r\n\r\n", {400, 431, None}),
    ])


async def send_malformed(at, counts, rng, until):
    while time.monotonic() < until:
        data, want = malformed(rng)
        counts["sent"] += 1
        reader, writer, _ = await send(at, data)
        status = None
        try:
            status, _ = await head_of(reader)
            counts.statuses[status] += 1
        except CLOSED:
            if None not in want:
                # A refusal may be lost where the server closes before it has read all that was sent.
                counts["malformed without an answer"] += 1
                want = want | {None}
        finally:
            writer.transport.abort()
        # While others have all the memory there is for bodies, a body is refused unread.
        if status not in want | {429}:
            raise Broken(f"{data[:200]} was answered with {status}, not {want}")
        counts["refused"] += 1
        await asyncio.sleep(0.1 * rng.random())


async def measure_capacity(at, rng, seconds):
    """Requests a second that as many clients get as can be served side by side."""
    counts, until = Counts(), time.monotonic() + seconds

    async def client():
        while time.monotonic() < until:
            await ask(at, counts, rng)

    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(64)))
    return counts["finished"] / (time.monotonic() - begun)


async def arrive(at, counts, rng, rate, leaving, until, tasks):
    """Requests at a rate, whether earlier ones were answered or not, until the time is over."""
    due = time.monotonic()
    while max(due, time.monotonic()) < until:
        tasks.create_task(ask(at, counts, rng, rng.random() < leaving))
        due += rng.expovariate(rate)
        # A client that is behind makes up for it.
        await asyncio.sleep(max(due - time.monotonic(), 0))


def status_of(pid):
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


async def sample(pid, counts, path, ended):
    """The server's memory once a second; returns it."""
    begun, rss = time.monotonic(), []
    with open(path, "w") as file:
        file.write("seconds,rss_mib,threads,open_files,sent,finished,refused,cancelled,idle,s200,s429\n")
        while not ended.is_set():
            row = status_of(pid)
            rss.append(row[0])
            shown = [counts[key] for key in ("sent", "finished", "refused", "cancelled", "idle now")] + [counts.statuses[200], counts.statuses[429]]
            file.write(",".join(map(str, [round(time.monotonic() - begun, 1), round(row[0], 1), *row[1:], *shown])) + "\n")
            file.flush()
            await asyncio.sleep(1)
    return rss


async def metrics(at):
    reader, writer = await connect(at)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await asyncio.wait_for(reader.read(), 60)).decode()
    writer.close()

    def value(name, label=""):
        found = re.findall(rf"^{name}{{[^}}]*{label}[^}}]*}} (\S+)$", text, re.M)
        return sum(map(float, found))

    return value


def draw(csv, svg):
    """The server's memory, and what becomes of requests in a second, over time."""
    with open(csv) as file:
        names, *rows = [line.split(",") for line in file.read().split()]
    columns = {name: [float(row[i]) for row in rows] for i, name in enumerate(names)}
    seconds, step = columns["seconds"], max(len(rows) // 200, 1)

    def rate(name):
        counts = columns[name]
        return [(seconds[i], (counts[i] - counts[i - step]) / (seconds[i] - seconds[i - step])) for i in range(step, len(rows), step)]

    panels = [
        ("memory of the server, MiB", [("#d03050", "resident", list(zip(seconds, columns["rss_mib"])))]),
        ("requests a second", [(color, name, rate(name)) for color, name in
                               [("#2070c0", "finished"), ("#909090", "refused"), ("#d09020", "cancelled")]]),
    ]
    width, height, left, top = 900, 240, 60, 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{2 * height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{2 * height}" fill="white"/>']
    for index, (title, curves) in enumerate(panels):
        base, tall, wide = (index + 1) * height - 30, height - top - 40, width - left - 20
        highest = max(y for *_, points in curves for _, y in points) * 1.1 or 1
        out.append(f'<text x="{left}" y="{base - tall - 8}">{title}</text>')
        for part in range(5):
            y = base - tall * part / 4
            out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide}" y2="{y:.1f}" stroke="#ddd"/>'
                       f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{highest * part / 4:.0f}</text>')
            x = left + wide * part / 4
            out.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{seconds[-1] * part / 4:.0f} s</text>')
        for place, (color, name, points) in enumerate(curves):
            line = " ".join(f"{left + wide * x / seconds[-1]:.1f},{base - tall * y / highest:.1f}" for x, y in points)
            out.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{line}"/>'
                       f'<text x="{left + wide - 90 * place}" y="{base - tall - 8}" text-anchor="end" fill="{color}">{name}</text>')
    with open(svg, "w") as file:
        file.write("\n".join(out) + "\n</svg>\n")


async def settle(at):
    """Waits until the server has nothing more to do, which it must have soon."""
    for _ in range(300):
        value = await metrics(at)
        if value("vllm:num_requests_running") == 0 and value("vllm:num_requests_waiting") == 0:
            return value
        await asyncio.sleep(0.2)
    raise Broken("the server still works on requests that nobody waits for")


async def greedy(at):
    """An answer that is always the same."""
    reader, writer = await connect(at)
    writer.write(request("/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 24, "temperature": 0}).encode()))
    text = await asyncio.wait_for(reader.read(), 300)
    writer.close()
    return json.loads(text.split(b"\r\n\r\n", 1)[1])["choices"]


async def storm(at, args, pid):
    rng, counts = random.Random(args.seed), Counts()
    before = await greedy(at)
    capacity = await measure_capacity(at, rng, args.warm_up)
    rejected_before = (await settle(at))("vllm:admission_rejections_total")
    print(f"capacity: {capacity:.1f} requests/s; sending {2 * capacity:.1f} for {args.seconds} s beside {args.idle} idle connections")
    ended, until = asyncio.Event(), time.monotonic() + args.seconds
    sampler = asyncio.create_task(sample(pid, counts, args.csv, ended))
    async with asyncio.TaskGroup() as tasks:
        for _ in range(args.idle):
            tasks.create_task(stay_idle(at, counts, rng, until))
        for _ in range(args.slow):
            tasks.create_task(read_slowly(at, counts, rng, until))
        for _ in range(4):
            tasks.create_task(send_malformed(at, counts, rng, until))
        tasks.create_task(arrive(at, counts, rng, 2 * capacity, args.leaving, until, tasks))
    value = await settle(at)
    ended.set()
    rss = await sampler
    counts.check()
    if await greedy(at) != before:
        raise Broken("an answer is not what it was before the storm")
    rejected = value("vllm:admission_rejections_total") - rejected_before
    if rejected < counts.statuses[429]:
        raise Broken(f"{counts.statuses[429]} answers of 429, but the server counts {rejected:.0f} rejections")
    for key, count in sorted(counts.items()):
        print(f"{key}: {count}")
    print(f"requests sent a second: {counts['sent'] / args.seconds:.0f}")
    print("by status:", dict(sorted(counts.statuses.items())))
    quarter = len(rss) // 4
    print(f"memory: {rss[0]:.0f} MiB at first, at most {max(rss):.0f}, {rss[-1]:.0f} at the end; "
          f"mean of the second quarter {sum(rss[quarter:2 * quarter]) / quarter:.0f}, of the last {sum(rss[3 * quarter:]) / len(rss[3 * quarter:]):.0f}")


class At:
    def __init__(self, url, tls):
        self.host, port = re.fullmatch(r"https?://([\d.]+):(\d+)", url).groups()
        self.port, self.tls = int(port), tls


def certificate(folder):
    """Flags of a server with a certificate made here, and what trusts it."""
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], check=True, capture_output=True)
    return ["--tls-cert", cert, "--tls-key", key], ssl.create_default_context(cafile=cert)


def main():
    parser = argparse.ArgumentParser(description="Storms a server of its own.")
    parser.add_argument("--server", required=True, help="the program")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--warm-up", type=float, default=10, help="seconds in which its capacity is measured")
    parser.add_argument("--idle", type=int, default=3000, help="connections that do nothing")
    parser.add_argument("--slow", type=int, default=2, help="clients that read slowly")
    parser.add_argument("--leaving", type=float, default=0.1, help="part of the clients that leave before the end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", default="storm.csv")
    parser.add_argument("--tls", action="store_true", help="over TLS")
    parser.add_argument("flags", nargs="*", help="the server's, after --")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        flags, tls = certificate(folder) if args.tls else ([], None)
        serve([*flags, *args.flags], tls, args)


def serve(flags, tls, args):
    server = subprocess.Popen([args.server, "--port", "0", *flags], stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"https?://\S+", server.stdout.readline()).group()
        asyncio.run(storm(At(url, tls), args, server.pid))
        draw(args.csv, os.path.splitext(args.csv)[0] + ".svg")
        begun = time.monotonic()
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        print(f"stopped with {code} within {time.monotonic() - begun:.1f} s")
        if code != 0:
            raise Broken(f"the server ended with {code}")
    finally:
        if server.poll() is None:
            server.kill()
    print("held")


if __name__ == "__main__":
    try:
        main()
    except (Broken, ExceptionGroup) as error:
        for error in getattr(error, "exceptions", [error]):
            print(f"broken: {error!r}", file=sys.stderr)
        sys.exit(1)
