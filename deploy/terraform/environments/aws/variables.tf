variable "region" {
  description = "Region of everything."
  type        = string
  default     = "eu-central-1"
}

variable "bucket_prefix" {
  description = "Makes the bucket's name unique in all of AWS, such as your domain with hyphens."
  type        = string
}

variable "zones" {
  description = "Availability zones of the region."
  type        = list(string)
  default     = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
  validation {
    condition     = length(var.zones) >= 2 && alltrue([for zone in var.zones : startswith(zone, var.region)])
    error_message = "Name two zones of the region at least."
  }
}

variable "admins" {
  description = "ARNs of the IAM principals that administer the cluster."
  type        = set(string)
  default     = []
}

variable "api_from" {
  description = "Addresses from which the cluster's API can be reached; empty: from inside the VPC only."
  type        = list(string)
  default     = []
}

variable "gpu_nodes" {
  description = "Nodes with a GPU for training: type and at most how many."
  type        = object({ type = string, max = number })
  default     = { type = "g6.xlarge", max = 0 }
}
