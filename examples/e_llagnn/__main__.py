"""E-LLaGNN against a running Lathe service: `python -m examples.e_llagnn --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lathe_client import ConnectionFailedError, LatheError
from tqdm import tqdm

from examples.e_llagnn import report
from examples.e_llagnn.collect import Recipe, Source
from examples.e_llagnn.graphs import TextGraph, load_cora, load_debian
from examples.e_llagnn.studies import STUDIES, Lab, Options, Rows, RowsError


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    graph = _load(arguments)
    options = Options(
        splits=tuple(arguments.splits or graph.splits),
        models=tuple(arguments.models),
        seeds=tuple(range(arguments.seeds)),
        strategies=tuple(arguments.strategies),
        budgets=tuple(arguments.budgets),
        depths=tuple(arguments.depths),
        recipe=Recipe(
            prompt=arguments.prompts[0],
            model=arguments.llms[0],
            join=arguments.join,
            max_tokens=arguments.max_tokens,
        ),
        prompts=tuple(arguments.prompts),
        llms=tuple(arguments.llms),
        scorers=tuple(arguments.scorers),
        ablation_budget=arguments.ablation_budget,
    )
    source = Source(arguments.url, graph, arguments.work, arguments.api_key)
    try:
        rows = Rows(arguments.rows or source.folder / "rows.json", source.digest)
        lab = Lab(source, rows)
        for study in arguments.studies:
            for run in tqdm(list(STUDIES[study](options)), desc=study, mininterval=10):
                lab.run(run)
    except ConnectionFailedError as error:
        sys.exit(f"error: no service at {error}")
    except (LatheError, RowsError) as error:
        sys.exit(f"error: {error}")
    finally:
        source.close()
    print(report.markdown(rows.rows))
    if arguments.plots is not None:
        report.plot(rows.rows, arguments.plots, f"e_llagnn_{arguments.graph}")


def _load(arguments: argparse.Namespace) -> TextGraph:
    if arguments.graph == "debian":
        return load_debian(arguments.nodes)
    if arguments.path is None:
        sys.exit("error: --graph cora needs --path, a folder with nodes.jsonl.gz and edges.csv.gz")
    return load_cora(arguments.path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.e_llagnn",
        description="Train GNNs on node features that an LLM has enriched, and report what it gave.",
        epilog="example: python -m examples.e_llagnn --graph debian --nodes 500 --studies budgets --seeds 2",
    )
    add = parser.add_argument
    add("--graph", choices=("cora", "debian"), default="debian")
    add("--path", type=Path, help="folder of Cora's files")
    add("--nodes", type=int, default=2000, help="of Debian's graph")
    add("--url", default="http://127.0.0.1:8000")
    add("--api-key")
    add("--work", type=Path, default=Path("e_llagnn_work"), help="vectors and rows; goes on there")
    add("--rows", type=Path, help="the JSON file of rows, of one graph; default in --work")
    add("--studies", nargs="*", choices=tuple(STUDIES), default=["budgets"])
    add("--splits", nargs="+")
    add("--models", nargs="+", default=["gcn", "sage", "gat"])
    add("--seeds", type=int, default=5, help="how many")
    add("--strategies", nargs="+", default=["random", "degree", "pagerank", "text_length"])
    add("--budgets", nargs="+", type=float, default=[0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
    add("--depths", nargs="+", type=int, default=[2, 4, 8, 16, 32])
    add(
        "--prompts", nargs="+", default=["summary@1"], help="the first is that of the other studies"
    )
    add("--llms", nargs="+", default=["smollm2-135m"], help="likewise")
    add("--join", choices=("append", "separate", "replace"), default="separate")
    add("--max-tokens", type=int, default=48)
    add("--scorers", nargs="+", default=["even", "embed"], help="also llm_rank, llm_pair")
    add("--ablation-budget", type=float, default=0.2)
    add("--threads", type=int, default=1)
    add("--plots", type=Path, help="folder for PNG files; needs matplotlib")
    return parser


if __name__ == "__main__":
    main()
