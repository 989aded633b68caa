"""What people read of a run: tables, curves, the report page. Draws from plain data; knows no pipeline and no jax."""
