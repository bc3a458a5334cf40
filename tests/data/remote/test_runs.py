"""Two ranks train from the hub and from S3, are killed, and resume to the same weights, at last without a server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from mixreorg_fast.cli import main
from mixreorg_fast.config import merged
from mixreorg_fast.data.shards.pair import write_shard
from mixreorg_fast.data.text.tokenizer import Tokenizer
from tests.data.conftest import pairs
from tests.training.test_faults import ROOT, assert_same_end, config, finish, start, steps

pytest.importorskip("deepspeed")


@pytest.mark.slow
@pytest.mark.launch
def test_runs_resume_from_the_cache(hub, bucket, tmp_path):
    first, tars = 0, {}
    for number, count in enumerate((11, 9, 12, 8, 10, 7)):
        path = tmp_path / f"train-{number:04d}.tar"
        write_shard(path, pairs(count, first))
        tars[path.name] = path.read_bytes()
        first += count
    hub.add("owner/set", tars, kind="dataset")
    for name, content in tars.items():
        bucket.put(f"set/{name}", content)
    Tokenizer.train(["a red thing", "a green thing", "a blue thing number 5"], 300).save(tmp_path)

    def run(name: str, shards: str) -> dict:
        cache = {"folder": str(tmp_path / f"cache_{name}"), "window": 2, "patience": 20.0}
        data = {"shards": shards, "cache": cache, "tokenizer": str(tmp_path / "tokenizer.json")}
        return merged(config(tmp_path, name), {"data": data})

    from_hub, from_s3 = "hf://datasets/owner/set/train-*.tar", f"s3://{bucket.name}/set/train-*.tar"
    runs = {name: run(name, from_hub) for name in ("whole", "hub")} | {"s3": run("s3", from_s3)}
    code, output = finish(start(tmp_path, (runs["whole"], {}), (runs["hub"], {"kill": (4, 1)})))
    assert code != 0 and steps(tmp_path / "runs" / "hub") == [2], output[-3000:]
    code, output = finish(start(tmp_path, (runs["hub"], {}), (runs["s3"], {"kill": (4, 0)})))
    assert code != 0 and "resumed from" in output, output[-3000:]
    assert_same_end(tmp_path / "runs" / "hub", tmp_path / "runs" / "whole")
    listings = [request for request in hub.requests if "/tree/" in request]
    assert len(listings) == 2, "one by each launch: rank 0 lists, the other takes its list"

    assert main(["data", "get", from_s3, "--cache-folder", runs["s3"]["data"]["cache"]["folder"]]) == 0
    bucket.stop()
    code, output = finish(start(tmp_path, (runs["s3"], {})))
    assert code == 0 and "the list stored at its last use is read" in output, output[-3000:]
    assert_same_end(tmp_path / "runs" / "s3", tmp_path / "runs" / "whole")


@pytest.mark.slow
@pytest.mark.launch
def test_a_process_whose_server_is_gone_ends_in_one_line(web, tars, tmp_path):
    content, ends = list(tars.values()), iter([threading.Thread(target=web.stop)])

    def until_the_sixth(path: str) -> bytes:
        if len(web.requests) >= 6 and (end := next(ends, None)):  # several requests may come at once
            end.start()
        return content[int(path[6:10]) % len(content)]

    web.content = until_the_sixth
    Tokenizer.train(["a red thing", "a green thing", "a blue thing number 5"], 300).save(tmp_path)
    cache = {"folder": str(tmp_path / "cache"), "window": 2, "size": "200 kB", "patience": 2.0}
    shards = f"{web.url}/train-{{0000..0019}}.tar?X-Amz-Signature=SECRET"
    data = {"shards": shards, "cache": cache, "tokenizer": str(tmp_path / "tokenizer.json")}
    (tmp_path / "run.json").write_text(json.dumps(merged(config(tmp_path, "lost", steps=30), {"data": data})))
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "run.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and len(errors) == 1 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert "data.cache.patience" in errors[0] and "SECRET" not in ended.stderr + ended.stdout
    assert 2 <= len((tmp_path / "runs" / "lost" / "metrics.jsonl").read_text().splitlines()) < 30
