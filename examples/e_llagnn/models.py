"""GCN (Kipf & Welling 2017), GraphSAGE (Hamilton et al. 2017) and GAT (Veličković et al. 2018), and what E-LLaGNN
(Jaiswal et al. 2024, arXiv:2407.14996) puts below them: h0 = m x+ + (1 - m) x, with m thinned out while training.

Layers are PyTorch Geometric's, unchanged. GCN and GraphSAGE multiply by a sparse matrix, which on a CPU takes half the
time of gathering and scattering; GAT needs the list of edges. Letters: N nodes, D features, E directed edges.
"""

import warnings
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GATConv, GCNConv, SAGEConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

ModelName = Literal["gcn", "sage", "gat"]
GAT_HEADS = 8


def mix(raw_ND: Tensor, enriched_ND: Tensor, mask_N: Tensor) -> Tensor:
    """Layer 0: the enriched vector where the mask is set, the raw one elsewhere."""
    h_ND = raw_ND.clone()
    h_ND[mask_N] = enriched_ND[mask_N]  # torch.where takes many times as long on a CPU
    return h_ND


def drop_enrichment(mask_N: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Enrichment dropout: each enriched node is taken raw with this probability, so that the GNN can do without."""
    return mask_N & (torch.rand(len(mask_N), generator=generator) >= probability)


def build_adjacency(model: ModelName, edge_index_2E: Tensor, num_nodes: int) -> Tensor:
    """What the layers of a model take for edges: messages go from row 0 to row 1 of `edge_index_2E`."""
    if model == "gat":
        return edge_index_2E
    if model == "gcn":
        edge_index_2E, weights = gcn_norm(edge_index_2E, num_nodes=num_nodes, dtype=torch.float32)
    else:
        weights = torch.ones(edge_index_2E.shape[1])
    coo = torch.sparse_coo_tensor(
        edge_index_2E.flip(0), weights, (num_nodes, num_nodes), check_invariants=True
    )
    with warnings.catch_warnings():  # torch says once that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        return coo.coalesce().to_sparse_csr()


class Gnn(nn.Module):
    """Layers with ReLU and dropout between them; the last one gives the logits.

    Args:
        num_layers: 1 or more; the width of all but the last is `hidden`.
    """

    def __init__(
        self,
        model: ModelName,
        *,
        num_features: int,
        hidden: int,
        num_classes: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [num_features, *[hidden] * (num_layers - 1), num_classes]
        self.layers = nn.ModuleList(
            _layer(model, width, following, is_last=index == num_layers - 1)
            for index, (width, following) in enumerate(pairwise(widths))
        )
        self.dropout = dropout

    def forward(self, h_ND: Tensor, adjacency: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            h_ND = layer(h_ND, adjacency)
            if index < len(self.layers) - 1:
                h_ND = functional.dropout(functional.relu(h_ND), self.dropout, self.training)
        return h_ND

    def gradient_norms(self) -> list[float]:
        """||dL/dW_l|| of every layer after a backward pass, over its weight matrices."""
        return [
            float(
                torch.linalg.vector_norm(
                    torch.cat(
                        [
                            parameter.grad.flatten()
                            for parameter in layer.parameters()
                            if parameter.ndim == 2 and parameter.grad is not None
                        ]
                    )
                )
            )
            for layer in self.layers
        ]


def _layer(model: ModelName, width: int, following: int, *, is_last: bool) -> Any:
    if model == "gcn":
        return GCNConv(width, following, normalize=False)  # the adjacency is
    if model == "sage":
        return SAGEConv(width, following)
    heads = 1 if is_last else GAT_HEADS
    return GATConv(width, following // heads, heads=heads)
