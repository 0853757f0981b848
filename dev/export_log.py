#!/usr/bin/env python3
"""Litespark logs for other viewers: TensorBoard's event files, offline runs of Weights & Biases. Nothing goes over a network.

    pip install tensorboard; python3 dev/export_log.py out/log.jsonl --tensorboard events     then tensorboard --logdir events
    pip install wandb; python3 dev/export_log.py out/log.jsonl --wandb runs     then wandb sync runs/wandb/offline-run-*

Each log is a run of its own, by the name of its folder. Metrics of updates are train/KEY, those of evaluations val/KEY, both
over the step; what is null in the log (unavailable, not finite) is left out. Options and facts of the run go with it. A log
that was resumed is one run.
"""
import argparse
import glob
import os
import sys

from plot_log import facts, label, number, read_log

NOT_METRICS = ("type", "step", "skipped", "sources", "tasks", "time", "energy")


def scalars(log):
    """[(step, seconds of updates up to it, {tag: value})] in the order of steps."""
    rows, seconds = [], 0
    for step in sorted(log["step"].keys() | log["val"].keys()):
        values, r = {}, log["step"].get(step)
        if r:
            seconds = r["time"]
            values = {f"train/{k}": r[k] for k in r if k not in NOT_METRICS and number(r, k)}
        val = log["val"].get(step, {})
        values |= {"val/" + k.removeprefix("val_"): val[k] for k in val if k not in NOT_METRICS and number(val, k)}
        rows.append((step, seconds, values))
    return rows


def to_tensorboard(path, name, log, folder):
    """events in folder/name; the log has no dates, so its file's is that of its last step."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        sys.exit("error: --tensorboard needs pip install tensorboard")
    out = os.path.join(folder, name)
    if glob.glob(os.path.join(out, "events.out.tfevents.*")):
        sys.exit(f"error: {out} holds events already, and TensorBoard would mix them; choose another folder")
    rows = scalars(log)
    begin = os.path.getmtime(path) - rows[-1][1]
    writer = EventFileWriter(out)
    for title, table in (("options", log["last"].get("options", {})), ("run", facts(log))):
        text = "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in table.items())
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=title + "/text_summary", metadata=kind, tensor=tensor)
        writer.add_event(Event(wall_time=begin, step=0, summary=Summary(value=[value])))
    for step, seconds, values in rows:
        summary = Summary(value=[Summary.Value(tag=k, simple_value=x) for k, x in values.items()])
        writer.add_event(Event(wall_time=begin + seconds, step=step, summary=summary))
    writer.close()
    print(out)


def to_wandb(path, name, log, folder):
    """A run in folder/wandb/offline-run-*."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    try:
        import wandb
    except ImportError:
        sys.exit("error: --wandb needs pip install wandb")
    os.makedirs(folder, exist_ok=True)
    quiet = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True)
    run = wandb.init(mode="offline", project="litespark", name=name, dir=folder, settings=quiet,
                     config={**log["last"].get("options", {}), "facts": facts(log)})
    place = os.path.dirname(run.dir)
    for step, _, values in scalars(log):
        run.log(values, step=step)
    run.finish()
    print(place)


def main():
    ap = argparse.ArgumentParser(description="export litespark logs")
    ap.add_argument("logs", nargs="+")
    ap.add_argument("--tensorboard", metavar="DIR", help="write TensorBoard's event files to DIR/NAME")
    ap.add_argument("--wandb", metavar="DIR", help="write offline runs of Weights & Biases to DIR/wandb")
    args = ap.parse_args()
    if not args.tensorboard and not args.wandb:
        sys.exit("error: name what to write: --tensorboard DIR or --wandb DIR")
    names = [os.path.basename(label(path)) for path in args.logs]
    if len(set(names)) < len(names):
        sys.exit(f"error: two logs would have one name ({', '.join(names)}); export them one by one")
    for path, name in zip(args.logs, names):
        try:
            log = read_log(path)
            if not log["step"] and not log["val"]:
                sys.exit(f"error: no step or val record in {path}")
            if args.tensorboard:
                to_tensorboard(path, name, log, args.tensorboard)
            if args.wandb:
                to_wandb(path, name, log, args.wandb)
        except OSError as e:
            sys.exit(f"error: {e.filename}: {e.strerror}")


if __name__ == "__main__":
    main()
