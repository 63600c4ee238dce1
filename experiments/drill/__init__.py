"""The fault drill: what becomes of runs whose processes are killed and whose files are damaged (`make drill`)."""
