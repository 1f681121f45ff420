"""What-if: the production decisions on a virtual clock."""
