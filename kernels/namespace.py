"""The torch.library namespace of this folder's ops: a bare copy and the installed package may live in one process."""

NAMESPACE = __package__.replace(".", "_")
