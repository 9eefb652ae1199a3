# One state a workspace: `default` is production, others carry their name (terraform workspace new staging).
terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = local.name }
  }
}

locals {
  name = terraform.workspace == "default" ? "neuroloop" : "neuroloop-${terraform.workspace}"
}

module "platform" {
  source = "../../modules/aws"

  name      = local.name
  bucket    = "${var.bucket_prefix}-${local.name}-store"
  zones     = var.zones
  admins    = var.admins
  api_from  = var.api_from
  gpu_nodes = var.gpu_nodes
  protected = terraform.workspace == "default"
}

output "platform" {
  description = "What the overlay deploy/kubernetes/overlays/eks needs to know."
  value       = module.platform
}
