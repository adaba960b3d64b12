"""Export a classifier or a trained run to ONNX."""

from pathlib import Path

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest

HELP = """metalearn export classifier=<folder>|run=<folder> [format=onnx] [out=<file.onnx>]

Writes an ONNX file, and compares its probabilities with this package's in onnxruntime. Requires
pip install 'metalearn-lab[export]'.

  metalearn export classifier=outputs/predict/<time>/classifier out=cells.onnx
      images [B, 3, H, W] -> probabilities [B, N]. Float32 in [0, 1]. The file's metadata name the
      classes, and say how to resize and crop an image.
  metalearn export run=outputs/protonet-omniglot/<time> out=protonet.onnx
      support_images [M, C, H, W], support_labels [M, N] (one-hot), query_images [Q, C, H, W]
      -> probabilities [Q, N]. Any number of classes, examples and queries. A method that adapts by
      gradient steps cannot be exported like this; a classifier made with it can:
      metalearn predict run=<folder> support=<examples> …
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("classifier={folder}", "run={folder}", "format=onnx", "out=")

_KEYS = ("classifier", "run", "format", "out")


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    words = list(args)
    classifier, run, form, out = (_arguments.take(words, key) for key in _KEYS)
    if words:
        hint = nearest(words[0].partition("=")[0], _KEYS)
        raise UserError(f"{words[0]}: export takes no such argument{hint}")
    if (classifier is None) == (run is None):
        raise UserError(
            "export: takes classifier=<folder> or run=<folder>; see metalearn export --help"
        )
    if form not in (None, "onnx"):
        raise UserError(f"format={form}: should be onnx")
    from metalearn.predict.export import export_classifier, export_run
    from metalearn.report.console import open_console, print_line

    folder = Path(classifier or run or "").expanduser()
    file = Path(out or folder.name + ".onnx").expanduser()
    worst = export_run(folder, file) if classifier is None else export_classifier(folder, file)
    console = open_console()
    print_line(console, f"Largest difference of a probability in onnxruntime: {worst:.1e}")
    print_line(console, f"  {file}")
    return 0
