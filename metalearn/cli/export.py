"""Export a classifier or a trained run to ONNX, or a run as a small model to share."""

from pathlib import Path

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest

HELP = """metalearn export classifier=<folder>|run=<folder> [format=onnx] [out=<file.onnx>]
                 run=<folder> format=safetensors [out=models/<name>]

format=safetensors writes a folder with the best weights, settings, result and a card (README.md)
that commands take like the run's: predict, evaluate and serve run=models/<name>. The first line of
the card is shown by metalearn list. A folder that exists is not replaced.

format=onnx (the default) writes an ONNX file, and compares its probabilities in onnxruntime with
this package's: a difference above 0.0001 is a failure (exit code 1). Requires
pip install 'metalearn-lab[export]'.

  metalearn export classifier=outputs/predict/<time>/classifier out=cells.onnx
      images [B, 3, H, W] -> probabilities [B, N], as `predict` computes them. Images are RGB,
      float32 in [0, 1] (a file's bytes divided by 255), resized and cropped as the file's metadata
      say: size, resize, interpolation, preprocessing, classes (a JSON list, in order), opset.
  metalearn export run=outputs/protonet-omniglot/<time> out=protonet.onnx
      support_images [M, C, H, W], support_labels [M, N] (one-hot), query_images [Q, C, H, W]
      -> probabilities [Q, N]. Images as `metalearn.load` takes them, float32 in [0, 1]. Any number
      of classes, examples and queries. A method that learns by gradients cannot be exported like
      this (exit code 2); a classifier made with it can:
      metalearn predict run=<folder> support=<examples> query=<images>

An ONNX file that exists is replaced. out=<name of the folder>.onnx by default.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("classifier={folder}", "run={folder}", "format=onnx|safetensors", "out=")


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    words = list(args)
    keys = _arguments.keys(TAKES)
    classifier, run, form, out = (_arguments.take(words, key) for key in keys)
    if words:
        hint = nearest(words[0].partition("=")[0], keys)
        raise UserError(f"{words[0]}: export takes no such argument{hint}")
    if (classifier is None) == (run is None):
        raise UserError(
            "export: takes classifier=<folder> or run=<folder>; see metalearn export --help"
        )
    if form not in (None, "onnx", "safetensors"):
        raise UserError(f"format={form}: should be onnx or safetensors")
    from metalearn.report.console import open_console, print_line, print_lines

    if form == "safetensors":
        from metalearn.run.model import export_model

        if run is None:
            raise UserError("format=safetensors: takes run=<folder>")
        model = export_model(Path(run).expanduser(), Path(out).expanduser() if out else None)
        for path in sorted(model.iterdir()):
            print_line(open_console(), f"  {path}  {path.stat().st_size:,} bytes")
        return 0
    from metalearn.predict.export import export_classifier, export_run

    folder = Path(classifier or run or "").expanduser()
    file = Path(out or folder.name + ".onnx").expanduser()
    export = export_run if classifier is None else export_classifier
    console = open_console()
    differences = export(folder, file)
    print_line(console, "Largest difference of a probability between onnxruntime and this package:")
    lines = [f"{difference:.1e}  {what}" for what, difference in differences.items()]
    print_lines(console, [*lines, file], "  ")
    return 0
