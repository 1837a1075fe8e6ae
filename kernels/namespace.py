"""The torch.library namespace of these ops: a copied folder and the installed package can be used in one process."""

NAMESPACE = __package__.replace(".", "_")
